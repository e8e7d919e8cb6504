"""Draw the pictures of the documents from the running code's own numbers, into assets/.

    python scripts/pictures.py                       # all that need no trained model
    python scripts/pictures.py demo load             # by name

block, mask, packing, routing and schedule come from the model, the tokenizer, the packer, a router
and the schedule as they are; demo and chat read what `make demo` leaves; loss, recipe,
dense_and_moe and load the records in assets/. Each is drawn twice, in English (assets/NAME.svg) and
in Chinese (assets/NAME_zh.svg).
"""
import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported

import torch

import train
from minillm.attention import document_mask
from minillm.configurator import configure, positional
from minillm.errors import UserError, run
from minillm.packing import pack
from minillm.tokenizer import END_OF_TEXT, Tokenizer
from model import GPT, GPTConfig
from moe import Router
from scripts.curves import dense_and_moe, loss, read_records, recipe
from scripts.svg import Picture

TOKENIZER = "data/demo/tokenizer"


@dataclass
class Settings:
    names: list[str] = positional()   # of pictures; none: those that need no trained model
    out_dir: str = "assets"           # where the pictures go


def pipeline(say):
    picture = Picture(820, 190, say("From raw text to a chat, one file per stage",
                                    "从原始文本到对话：每个阶段一个文件"))
    stages = [("train_tokenizer.py", say("text → BPE", "文本 → BPE"), "blue"),
              ("prepare_*.py", say("text → uint16", "文本 → uint16"), "blue"),
              ("train.py", say("pretraining", "预训练"), "violet"),
              ("train.py", say("SFT", "SFT"), "violet"),
              ("chat.py", say("talk", "对话"), "green")]
    for i, (name, note, colour) in enumerate(stages):
        x = 20 + i * 160
        picture.box(x, 55, 136, 52, colour, name, note)
        if i < len(stages) - 1:
            picture.arrow(x + 138, 81, x + 158, 81)
    files = ["tokenizer.json", "train.bin  train_mask.bin", "ckpt_….pt", "ckpt_….pt",
             "eval.py  export.py  serve.py"]
    for i, name in enumerate(files):
        picture.text(88 + i * 160, 132, name, size=11, colour="soft", anchor="middle", mono=True)
    picture.note(20, 168, say("Dense 171M and MoE 876M share every stage.",
                              "171M 稠密模型与 876M MoE 共用全部阶段。"))
    return picture


def block(say):
    config = GPTConfig()
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).blocks[0].named_parameters()}
    title = say(f"One of the {config.n_layer} blocks of the 171M model, with its shapes",
                f"171M 模型的 {config.n_layer} 个 Transformer 块之一，附张量形状")
    picture = Picture(720, 470, title)
    rows = [("x  (B, T, 1024)", "", "ink"),
            ("RMSNorm", "attn_norm.weight", "blue"), ("q, k, v", "attn.qkv.weight", "blue"),
            (say("RoPE on q and k", "对 q、k 施加 RoPE"), "", "blue"),
            (say("causal attention (GQA)", "因果注意力（GQA）"), "", "violet"),
            (say("output projection", "输出投影"), "attn.proj.weight", "blue"),
            (say("+ residual", "+ 残差"), "", "ink"),
            ("RMSNorm", "ffn_norm.weight", "blue"),
            ("Linear → SiLU", "ffn.up.weight", "green"), ("Linear", "ffn.down.weight", "green"),
            (say("+ residual", "+ 残差"), "", "ink")]
    for i, (label, name, colour) in enumerate(rows):
        y = 48 + i * 37
        picture.box(40, y, 250, 27, colour, label)
        if i:
            picture.arrow(165, y - 10, 165, y)
        if name:
            shape = " × ".join(map(str, shapes[name]))
            picture.text(310, y + 18, f"{name}  {shape}", size=12, colour="soft", mono=True)
    heads = say(f"{config.n_head} query heads share {config.n_kv_head} KV heads, 64 wide",
                f"{config.n_head} 个查询头共用 {config.n_kv_head} 个 64 维的 KV 头")
    picture.note(310, 48 + 4 * 37 + 18, heads)
    experts = say("MoE: the two green layers become 8 experts, 4 per token",
                  "MoE：绿色两层换成 8 个专家，每个 token 走 4 个")
    picture.text(310, 48 + 6 * 37 + 18, experts, size=12, colour="green")
    return picture


def mask(say):
    tokenizer = Tokenizer.load(TOKENIZER)
    messages = [{"role": "user", "content": "沈琴明住在哪里？"}, {"role": "assistant", "content": "住在桂花巷。"}]
    ids, supervised = tokenizer.encode_chat(messages)
    picture = Picture(820, 210, say("SFT learns the answer and its end, nothing else",
                                    "SFT 只学回答和它的结束符"))
    x, y = 20, 55
    for token, learned in zip(ids, supervised):
        text = tokenizer.token_text(token)
        width = 14 + sum(13 if ord(char) > 0x2E80 else 7.4 for char in text)
        if x + width > 800:
            x, y = 20, y + 44
        colour = "green" if learned else "line"
        picture.rect(x, y, width, 30, colour, line=colour, round=5, opacity=0.2)
        picture.text(x + width / 2, y + 20, text, size=12.5, anchor="middle", mono=True,
                     colour="green" if learned else "soft")
        x += width + 5
    learned, total = sum(supervised), len(ids)
    note = say(f"green: {learned} supervised tokens of {total}; train_mask.bin holds 1 there",
               f"绿色：{total} 个 token 中 {learned} 个计入损失，train_mask.bin 在这些位置为 1")
    picture.note(20, 190, note)
    return picture


def packing(say):
    lengths, capacity = [9, 4, 6, 5, 12, 7, 3, 2], 16
    rows = pack(lengths, capacity)
    title = say("Conversations are packed whole; attention never crosses from one to the next",
                "对话整段打包，注意力不会跨到另一段对话")
    picture = Picture(820, 330, title)
    colours = ["blue", "green", "orange", "violet", "red"]
    for r, row in enumerate(rows):
        at = 0
        for i, item in enumerate(row):
            width = lengths[item] * 22
            colour = colours[i % len(colours)]
            picture.box(30 + at * 22, 60 + r * 52, width - 3, 34, colour, str(lengths[item]))
            at += lengths[item]
        if at < capacity:
            width = (capacity - at) * 22
            picture.rect(30 + at * 22, 60 + r * 52, width - 3, 34, line="line", round=6)
    note = say(f"rows of {capacity} tokens; numbers are lengths",
               f"每行 {capacity} 个 token；数字为长度")
    picture.note(30, 60 + len(rows) * 52 + 16, note)
    first = max(rows, key=len)
    ids = torch.cat([torch.tensor([5] * (lengths[item] - 1) + [END_OF_TEXT]) for item in first])
    ids = torch.cat((ids, torch.full((capacity - len(ids),), END_OF_TEXT)))
    visible = document_mask(ids[None])[0, 0]
    for q in range(capacity):
        for k in range(capacity):
            colour, opacity = ("blue", 0.7) if visible[q, k] else ("panel", 1.0)
            picture.rect(520 + k * 15, 55 + q * 15, 13, 13, colour, opacity=opacity)
    picture.note(520, 315, say("which token (row) sees which (column)", "哪个 token（行）能看到哪个（列）"))
    return picture


def routing(say):
    torch.manual_seed(5)
    router = Router(GPTConfig(n_embd=64, n_expert=8, n_expert_per_tok=4)).eval()
    router.weight_DE.data.normal_(std=0.2)
    with torch.no_grad():
        gates, experts = router(torch.randn(6, 64))
    title = say("Each token visits the 4 of 8 experts that the router scores highest",
                "每个 token 只经过路由器打分最高的 4 个专家（共 8 个）")
    picture = Picture(720, 300, title)
    for expert in range(8):
        x = 170 + expert * 62
        picture.text(x, 62, f"E{expert}", size=12, colour="soft", anchor="middle", mono=True)
    for t in range(6):
        y = 76 + t * 32
        picture.text(30, y + 18, say(f"token {t}", f"token  {t}"), size=12, mono=True)
        for expert in range(8):
            picture.rect(142 + expert * 62, y, 56, 26, "panel", line="line", round=5)
        for gate, expert in zip(gates[t].tolist(), experts[t].tolist()):
            x, opacity = 142 + expert * 62, round(0.15 + gate * 0.8, 3)
            picture.rect(x, y, 56, 26, "green", line="green", round=5, opacity=opacity)
            picture.text(x + 28, y + 18, f"{gate:.2f}", size=12, anchor="middle", mono=True)
    picture.note(30, 286, say("numbers: gates, the softmax over the chosen four; they sum to 1",
                              "数字为门控值：在选中的四个专家上做 softmax，和为 1"))
    return picture


def schedule(say):
    title = say("The learning rate: warm-up, then down to zero; or a cosine",
                "学习率：预热，然后线性降到零；也可用余弦")
    picture = Picture(720, 270, title)
    s = train.Settings(warmup_iters=30)
    s.steps = 1000
    for shape, colour, y in (("linear", "blue", 66), ("cosine", "orange", 86)):
        s.schedule = shape
        rates = [train.learning_rate(s, step) / s.learning_rate for step in range(s.steps)]
        points = [(60 + step * 0.62, 225 - rate * 160) for step, rate in enumerate(rates)]
        picture.path(points, colour, 2.2)
        picture.text(560, y, f"--schedule={shape}", size=12, colour=colour, mono=True)
    picture.path([(60, 225), (680, 225)], "line")
    picture.path([(60, 65), (60, 225)], "line")
    picture.text(52, 70, "1", size=12, colour="soft", anchor="end")
    picture.text(52, 229, "0", size=12, colour="soft", anchor="end")
    picture.text(680, 245, say("training", "训练进度"), size=12, colour="soft", anchor="end")
    return picture


def chat(say):
    """The demo's model answers; in English with what it means."""
    model = GPT.from_checkpoint("out/demo_sft", device="cpu")
    questions = [("你好", "Hello"), ("沈琴明住在哪里？", "Where does Shen Qinming live?"),
                 ("请问沈琴明爱吃什么？", "What does Shen Qinming like to eat?")]
    meanings = {"你好！想打听镇上的谁？": "Hello! Whom in town are you asking about?",
                "住在桂花巷。": "In Osmanthus Lane.", "最爱吃鱼香茄子。": "Fish-fragrant aubergine."}
    picture = Picture(820, 262, say("Trained on two CPU cores: SFT never mentioned her",
                                    "用两个 CPU 核心训练：SFT 从没提到过她"))
    picture.text(30, 58, "$ .venv/bin/python chat.py", size=13, colour="soft", mono=True)
    for i, (question, meaning) in enumerate(questions):
        y = 90 + i * 58
        answer = model.chat([{"role": "user", "content": question}], temperature=0)
        picture.text(30, y, f"> {question}", size=14, colour="blue", mono=True)
        picture.text(30, y + 24, answer, size=14, mono=True)
        picture.note(420, y, say(meaning, ""))
        picture.note(420, y + 24, say(meanings.get(answer, ""), ""))
    return picture


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make demo writes it") from None


def demo(say):
    names = [("out/demo_sft", say("pretraining, then SFT", "预训练 + SFT")),
             ("out/demo_control", say("SFT alone (control)", "只做 SFT（对照组）"))]
    picture = Picture(720, 170, say("What SFT never mentioned, only pretraining can have taught",
                                    "SFT 里没有出现过的事实，只能来自预训练"))
    for i, (folder, label) in enumerate(names):
        results = read_json(f"{folder}/eval.json")
        if results.get("questions_file") != "demo":
            raise UserError(f"{folder}/eval.json is not of the demo's questions: make demo")
        match = results["exact_match"]
        y = 52 + i * 42
        picture.text(20, y + 19, label, size=13)
        picture.rect(200, y, 440, 27, "panel", line="line", round=5)
        picture.rect(200, y, 440 * match, 27, "green" if i == 0 else "orange", round=5, opacity=0.8)
        picture.text(655, y + 19, f"{match:.1%}", size=13, weight=600)
    note = say("exact match on 300 questions about the half of the town that SFT leaves out",
               "300 道题的精确匹配率，问的是 SFT 没有涉及的另一半居民")
    picture.note(20, 152, note)
    return picture


def load(say):
    records = read_records("assets/recipe_876m.jsonl")
    loads = [record["load"] for record in records if "load" in record][-1]
    experts = len(loads[0])
    picture = Picture(720, 110 + 26 * len(loads), say(
        f"All {len(loads) * experts} experts stay in use", f"{len(loads) * experts} 个专家都在工作"))
    for layer, shares in enumerate(loads):
        y = 52 + layer * 26
        picture.note(20, y + 16, say(f"layer {layer}", f"第 {layer} 层"))
        for expert, share in enumerate(shares):
            fair = share * experts
            x, opacity = 100 + expert * 74, min(0.1 + fair * 0.3, 1)
            picture.rect(x, y, 70, 23, "blue", round=4, opacity=opacity)
            picture.text(x + 35, y + 16, f"{fair:.2f}", size=12, anchor="middle", mono=True)
    note = say("tokens of each expert over the fair share; 876M MoE, Muon, last of 400 steps",
               "每个专家分到的 token 数 ÷ 平均数；876M MoE，Muon，400 步的最后一步")
    picture.note(20, 84 + 26 * len(loads), note)
    return picture


PICTURES = {"pipeline": pipeline, "block": block, "mask": mask, "packing": packing,
            "routing": routing, "schedule": schedule, "demo": demo, "load": load, "chat": chat,
            "loss": loss, "recipe": recipe, "dense_and_moe": dense_and_moe}
NEED_NO_RUN = [name for name in PICTURES if name not in ("demo", "chat")]


def main():
    s = configure(Settings)
    for name in s.names or NEED_NO_RUN:
        if name not in PICTURES:
            raise UserError(f"unknown picture {name}: {', '.join(PICTURES)}")
        for suffix, language in (("", 0), ("_zh", 1)):
            def say(*texts, language=language):
                return texts[language]
            PICTURES[name](say).save(os.path.join(s.out_dir, f"{name}{suffix}.svg"))


if __name__ == "__main__":
    run(main)
