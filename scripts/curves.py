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


def curve(path, key, x="tokens", factor=1.0):
    """[(x, value)] of a run; x: million tokens, or 10^15 training FLOPs."""
    records = read_records(path)
    end = records[-1]
    per_step = end["tokens"] / end["step"] / 1e6
    if x == "flops":
        per_step *= 6 * end["active_parameters"] / 1e9
    return [(record["step"] * per_step, record[key] * factor)
            for record in records if record.get(key) is not None and record["step"] > 0]


def panel(picture, x, width, series, lowest, highest, label):
    """Curves [(points, colour, width of the line)] on axes of their own, 190 pixels high."""
    right = max(point[0] for points, _, _ in series for point in points)

    def place(point):
        share = (highest - min(point[1], highest)) / (highest - lowest)
        return x + point[0] / right * width, 60 + share * 190
    steps = 5
    for i in range(steps + 1):
        value = lowest + (highest - lowest) * i / steps
        y = 250 - i * 190 / steps
        picture.path([(x, y), (x + width, y)], "line", 1)
        picture.text(x - 8, y + 4, f"{value:.1f}", size=11, colour="soft", anchor="end")
    for i in range(5):
        number = right * i / 4
        shown = f"{number:.0f}" if right > 8 else f"{number:.1f}"
        picture.text(x + width * i / 4, 268, shown, size=11, colour="soft", anchor="middle")
    picture.text(x + width / 2, 286, label, size=12, colour="soft", anchor="middle")
    for points, colour, thickness in series:
        picture.path([place(point) for point in points], colour, thickness)


def loss(say):
    picture = Picture(820, 330, say("The loss falls as tokens go by; SFT learns other text",
                                    "损失随 token 数下降；SFT 学的是另一种文本"))
    for x, path, colour, name in ((60, "assets/pretrain.jsonl", "blue", say("pretraining", "预训练")),
                                  (470, "assets/sft.jsonl", "violet", "SFT")):
        training, validation = curve(path, "loss"), curve(path, "val_loss")
        values = [value for _, value in training[len(training) // 10:] + validation]
        lowest, highest = int(min(values)), int(max(values)) + 1
        label = name + say(", million tokens", "，百万 token")
        series = [(training, "line", 1.2), (validation, colour, 2.4)]
        panel(picture, x, 320, series, lowest, highest, label)
        last = validation[-1][1]
        picture.text(x + 310, 78, say(f"validation {last:.3f}", f"验证 {last:.3f}"), size=13,
                     colour=colour, anchor="end", weight=600)
    picture.text(20, 315, say("nats per token; thin: training, thick: validation",
                              "单位：每 token 的 nats；细线：训练，粗线：验证"), size=12, colour="soft")
    return picture


BYTES_PER_TOKEN = 4.2266      # of the validation text: 3.750 nats are 1.280 bits per byte


def dense_and_moe(say):
    picture = Picture(820, 330, say("At equal tokens MoE wins, at equal FLOPs the dense model",
                                    "token 数相同时 MoE 更好，FLOPs 相同时稠密模型更好"))
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
    picture.text(20, 315, say("validation, bits per byte; AdamW, 512 tokens of context",
                              "验证集，每字节比特数；AdamW，上下文 512"), size=12, colour="soft")
    return picture
