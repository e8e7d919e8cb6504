"""The curves among the pictures of the documents, from the records in assets/. See pictures.py."""
import json
import math

from minillm.errors import UserError
from scripts.svg import Picture


def read_records(path):
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def curve(path, key, x="tokens", factor=1.0, ms_per_step=0.0):
    """[(x, value)] of a run; x: million tokens, seconds, or 10^15 training FLOPs."""
    records = read_records(path)
    end = records[-1]
    scale = end["tokens"] / end["step"] / 1e6
    if x == "flops":
        scale *= 6 * end["active_parameters"] / 1e9
    elif x == "seconds":
        scale = ms_per_step / 1000
    return [(record["step"] * scale, record[key] * factor)
            for record in records if record.get(key) is not None and record["step"] > 0]


def round_steps(lowest, highest):
    """Three to seven round numbers that lie evenly from `lowest` to `highest`."""
    size = 10 ** math.floor(math.log10(highest - lowest))
    step = next(size * part for part in (0.1, 0.2, 0.25, 0.5, 1, 2)
                if (highest - lowest) / (size * part) <= 6.5)
    first, last = math.ceil(lowest / step - 1e-6), math.floor(highest / step + 1e-6)
    return [number * step for number in range(first, last + 1)]


def panel(picture, x, width, series, lowest, highest, label, top=60):
    """Curves [(points, colour, width of the line)] on axes of their own, 190 pixels high."""
    right = max(point[0] for points, _, _ in series for point in points)
    bottom = top + 190

    def place(point):
        share = (highest - min(point[1], highest)) / (highest - lowest)
        return x + point[0] / right * width, top + share * 190

    for value in round_steps(lowest, highest):
        _, y = place((0, value))
        picture.path([(x, y), (x + width, y)], "line", 1)
        picture.text(x - 8, y + 4, f"{value:.1f}", size=11, colour="soft", anchor="end")
    for number in round_steps(0, right):
        along, _ = place((number, lowest))
        picture.path([(along, bottom), (along, bottom + 4)], "line", 1)
        picture.text(along, bottom + 18, f"{number:g}", size=11, colour="soft", anchor="middle")
    picture.text(x + width / 2, bottom + 36, label, size=12, colour="soft", anchor="middle")
    for points, colour, thickness in series:
        picture.path([place(point) for point in points], colour, thickness)


def loss(say):
    picture = Picture(820, 330, say("The loss falls as tokens go by; SFT learns other text",
                                    "损失随 token 数下降；SFT 学的是另一种文本"))
    for x, path, colour, name in (
            (60, "assets/recipe_171m.jsonl", "blue", say("pretraining", "预训练")),
            (470, "assets/sft.jsonl", "violet", "SFT")):
        training, validation = curve(path, "loss"), curve(path, "val_loss")
        values = [value for _, value in training[len(training) // 10:] + validation]
        lowest, highest = int(min(values)), int(max(values)) + 1
        label = name + say(", million tokens", "，百万 token")
        series = [(training, "soft", 1.0), (validation, colour, 2.4)]
        panel(picture, x, 320, series, lowest, highest, label)
        last = validation[-1][1]
        picture.text(x + 310, 78, say(f"validation {last:.3f}", f"验证 {last:.3f}"), size=13,
                     colour=colour, anchor="end", weight=600)
    note = say("nats per token; thin: training, thick: validation on 4 batches; Muon, 171M",
               "单位：nat/token；细线：训练，粗线：4 个批次上的验证；Muon，171M")
    picture.note(20, 315, note)
    return picture


BITS_PER_NAT = 1.2053 / 3.6550         # of the validation text: eval.py prints both of one model
MS_PER_STEP = {"recipe_171m": 74.6, "adamw_171m": 70.6, "recipe_876m": 219.5, "adamw_876m": 199.5}


def recipe(say):
    """Muon against AdamW, by tokens (left) and by seconds (right), dense above MoE."""
    title = say("Muon reaches the last loss of AdamW with about a third of the tokens",
                "达到 AdamW 的最终损失，Muon 只需约三分之一的 token")
    picture = Picture(820, 600, title)
    for row, size, name in ((0, "171m", say("dense 171M", "稠密 171M")), (1, "876m", "MoE 876M")):
        for x, axis, label in ((60, "tokens", say(", million tokens", "，百万 token")),
                               (470, "seconds", say(", seconds of training", "，训练秒数"))):
            series = []
            for run, colour in (("recipe", "blue"), ("adamw", "orange")):
                key = f"{run}_{size}"
                points = curve(f"assets/{key}.jsonl", "val_loss", axis, BITS_PER_NAT,
                               MS_PER_STEP[key])
                series.append((points, colour, 2.4))
            top = 60 + row * 265
            panel(picture, x, 320, series, 1.0, 2.2, name + label, top)
            for (points, colour, _), optimizer, y in zip(series, ("Muon", "AdamW"), (18, 38)):
                picture.text(x + 310, top + y, f"{optimizer} {points[-1][1]:.2f}", size=13,
                             colour=colour, anchor="end", weight=600)
    note = say("validation on 4 batches, bits per byte; seconds: steps × the milliseconds of a "
               "step on an idle H200",
               "4 个批次上的验证，每字节比特数；秒数 = 步数 × 空闲 H200 上每步的毫秒数")
    picture.note(20, 585, note)
    return picture


BYTES_PER_TOKEN = 4.2266      # of an earlier validation text: 3.750 nats are 1.280 bits per byte


def dense_and_moe(say):
    picture = Picture(820, 330, say("With AdamW: at equal tokens MoE wins, at equal FLOPs dense",
                                    "用 AdamW 时：token 数相同 MoE 更好，FLOPs 相同稠密更好"))
    moe, short, long = (f"assets/{name}.jsonl" for name in (
        "pretrain_876m_1110_steps", "pretrain_171m_1110_steps", "pretrain_171m"))
    bits = 1 / math.log(2) / BYTES_PER_TOKEN
    for x, other, axis, label in (
            (60, short, "tokens", say("million tokens", "百万 token")),
            (470, long, "flops", say("training FLOPs, 10^15", "训练 FLOPs，10^15"))):
        curves = [curve(path, "val_loss", axis, bits) for path in (other, moe)]
        series = [(curves[0], "blue", 2.2), (curves[1], "orange", 2.2)]
        panel(picture, x, 320, series, 1.2, 2.2, label)
        for points, colour, name, y in ((curves[0], "blue", say("dense", "稠密"), 78),
                                        (curves[1], "orange", "MoE", 98)):
            picture.text(x + 310, y, f"{name} {points[-1][1]:.3f}", size=13, colour=colour,
                         anchor="end", weight=600)
    note = say("validation, bits per byte; AdamW, earlier text; not repeated with Muon",
               "验证集，每字节比特数；AdamW，较早的文本；没有用 Muon 重做")
    picture.note(20, 315, note)
    return picture
