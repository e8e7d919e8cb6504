"""How good is a model: on its validation data, and on questions with a known answer.

    python eval.py                                             # the demo: the questions SFT never taught
    python eval.py --out_dir=out/sft --questions=FILE.jsonl    # chats whose last message is the right answer
    python eval.py --out_dir=out/pretrain --eval_iters=0       # all of the validation split

Prints the loss in nats a token (over learned tokens, the language loss alone), perplexity, bits per
byte of text (comparable between tokenizers), next-token accuracy, and for a mixture of experts the
share of tokens of every expert in every layer; then answers the questions greedily and counts those
that match to the character. The same model and data give the same numbers. The results are also
written to out_dir/eval.json.
"""
import json
import math
import os
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minillm.attention import document_mask
from minillm.run_folder import read_settings
from minillm.configurator import configure
from minillm.errors import UserError, run
from minillm.dataloader import TokenData
from minillm.device import autocast, describe, pick_device, pick_dtype
from model import GPT
from minillm.tokenizer import IM_END


@dataclass
class Settings:
    out_dir: str = "out/demo_sft"     # folder of the model, as train.py leaves it
    data_dir: str = ""                # token files whose validation split is scored; empty: those it was trained on
    questions: str = "auto"           # file of chats to answer, "demo" for the held-out half of the town, "none"; auto: demo for a demo's SFT
    which: str = "newest"             # checkpoint: newest or best
    eval_iters: int = 0               # validation batches; 0: all
    batch_size: int = 16              # windows, or questions, at once
    max_new_tokens: int = 64          # longest answer
    show: int = 3                     # wrong answers to print
    device: str = "auto"              # auto, cpu, cuda, cuda:N
    dtype: str = "auto"               # of the matrix products: auto, float32, bfloat16


@torch.inference_mode()
def score(model, data, doc_mask, batch_size, batches, device, dtype):
    """Loss (nats a learned token), accuracy, number of learned tokens, share of tokens per expert (n_layer, n_expert) or None."""
    loss = correct = learned = 0.0
    share, seen = 0.0, 0
    starts = range(0, data.n_windows, batch_size)
    starts = starts[:batches] if batches else starts
    for start in tqdm(starts, unit="batch", disable=None):
        x, y = (t.to(device) for t in data.windows(range(start, min(start + batch_size, data.n_windows))))
        with autocast(device, dtype):
            logits, moe = model.logits_and_stats(x, document_mask(x) if doc_mask else None)
        logits, target = logits.flatten(0, 1).float(), y.flatten()
        loss += torch.nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="sum").double().item()
        correct += (logits.argmax(-1) == target).sum().item()
        learned += (target >= 0).sum().item()
        if moe:
            share, seen = share + moe[1].double() * x.numel(), seen + x.numel()
    return loss / max(learned, 1), correct / max(learned, 1), int(learned), share / seen if seen else None


def bits_per_byte(loss, split, kind):
    """nats a token → bits a byte of UTF-8 text, by the split's counts of tokens and bytes."""
    try:
        learned, bytes_ = (split["learned_tokens"], split["learned_bytes"]) if kind == "sft" else (split["tokens"], split["bytes"])
    except KeyError as error:
        raise UserError(f"the data's meta.json does not count {error}: prepare the data again") from None
    return loss / math.log(2) * learned / bytes_ if bytes_ else float("nan")


def read_questions(name):
    """[(messages without the last, the right answer)] of a file, or of the demo town's held-out half."""
    from minillm.text_reader import Report, Source, conversations
    if name == "demo":
        from demo.town import held_out_questions
        chats = [[{"role": {"human": "user"}.get(m["from"], m["from"]), "content": m["value"]} for m in chat["conversations"]]
                 for chat in held_out_questions()]
    else:
        chats = [messages for _, messages in conversations(Source([name], Report(False), "utf-8"))]
    pairs = [(chat[:-1], chat[-1]["content"]) for chat in chats if len(chat) > 1 and chat[-1]["role"] == "assistant"]
    if not pairs:
        raise UserError(f"{name} holds no chat that ends with an answer")
    return pairs


def answer_all(model, pairs, batch_size, max_new_tokens):
    """Greedy answers to all questions, `batch_size` at a time: a list of texts."""
    tokenizer, answers = model.tokenizer, []
    for start in tqdm(range(0, len(pairs), batch_size), unit="batch", disable=None):
        prompts = [tokenizer.encode_chat(messages, add_generation_prompt=True)[0] for messages, _ in pairs[start: start + batch_size]]
        ids = [[] for _ in prompts]
        for row in model.generate(prompts, max_new_tokens, temperature=0, stop_ids=(IM_END,)):
            for answer, token in zip(ids, row):
                if token is not None and token != IM_END:
                    answer.append(token)
        answers += [tokenizer.decode(answer) for answer in ids]
    return answers


def main():
    s = configure(Settings)
    if s.batch_size < 1 or s.max_new_tokens < 1 or s.eval_iters < 0 or s.show < 0:
        raise UserError("batch_size and max_new_tokens must be at least 1, eval_iters and show at least 0")
    started = time.time()
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    model = GPT.from_checkpoint(s.out_dir, device=s.device, dtype="float32", which=s.which)
    trained = read_settings(s.out_dir, "data_dir", "doc_mask")
    s.data_dir = s.data_dir or trained["data_dir"]
    data = TokenData(s.data_dir, "val", model.config.block_size)
    if data.meta["tokenizer_hash"] != model.tokenizer.hash:
        raise UserError(f"{s.data_dir} was prepared with another tokenizer than the model in {s.out_dir} has")
    total, active = model.n_params()
    print(f"{s.out_dir}, step {model.step} · {describe(device)} · {total:,} parameters" + (f", {active:,} active" if active != total else ""))
    loss, accuracy, learned, share = score(model, data, trained["doc_mask"], s.batch_size, s.eval_iters, device, dtype)
    results = {"step": model.step, "data_dir": s.data_dir, "loss": loss, "perplexity": math.exp(min(loss, 700)),
               "bits_per_byte": bits_per_byte(loss, data.meta["splits"]["val"], data.meta["kind"]), "accuracy": accuracy, "tokens": learned}
    print(f"{s.data_dir}, {learned:,} tokens: loss {loss:.4f} · perplexity {results['perplexity']:.2f} · "
          f"{results['bits_per_byte']:.4f} bits per byte · accuracy {accuracy:.2%}")
    if share is not None:
        results["load"] = share.tolist()
        print("share of tokens per expert, as a multiple of the fair share")
        print("layer  " + "".join(f"{expert:>7}" for expert in range(share.shape[1])))
        for layer, row in enumerate(share * share.shape[1]):
            print(f"{layer:>5}  " + "".join(f"{value:7.2f}" for value in row.tolist()))
    if s.questions == "auto":
        s.questions = "demo" if data.meta["kind"] == "sft" and str(data.meta.get("sources")).find("demo_corpus") >= 0 else "none"
    if s.questions != "none":
        pairs = read_questions(s.questions)
        answers = answer_all(model, pairs, s.batch_size, s.max_new_tokens)
        right = sum(answer == expected for answer, (_, expected) in zip(answers, pairs))
        results |= {"questions": len(pairs), "right": right, "exact_match": right / len(pairs)}
        wrong = [(messages[-1]["content"], expected, answer) for answer, (messages, expected) in zip(answers, pairs) if answer != expected]
        for question, expected, answer in wrong[: s.show]:
            print(f"  wrong: {question} → {answer.replace(chr(0xFFFD), '')} (right: {expected})")
        print(f"{s.questions}: {right} of {len(pairs)} questions answered exactly, {right / len(pairs):.1%}")
    results["seconds"] = time.time() - started
    with open(os.path.join(s.out_dir, "eval.json.tmp"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    os.replace(os.path.join(s.out_dir, "eval.json.tmp"), os.path.join(s.out_dir, "eval.json"))


if __name__ == "__main__":
    run(main)
