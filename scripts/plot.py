"""Draw metrics.jsonl, the record that every run leaves in its folder (needs matplotlib).

    python scripts/plot.py out/pretrain                                  # loss over tokens
    python scripts/plot.py dense=out/pretrain moe=out/moe_pretrain --x=flops --bytes_per_token=4.23
    python scripts/plot.py out/moe_pretrain --what=load                  # how the experts share the work

A run is a folder or a .jsonl file, with a label and = before it if the label is not to be its name. Training losses are
drawn thin, validation losses thick. With bytes_per_token (bytes / tokens of the split in meta.json) losses become bits a byte.
"""
import json
import math
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minillm.configurator import configure, positional
from minillm.errors import UserError, run


@dataclass
class Settings:
    runs: list[str] = positional()    # folders or .jsonl files, each perhaps as label=PATH
    out: str = "loss.png"             # the picture
    what: str = "loss"                # loss, or load: shares of a mixture's experts
    x: str = "tokens"                 # step, tokens or flops (6 × active parameters × tokens)
    bytes_per_token: float = 0.0      # above 0: bits per byte in place of nats per token
    title: str = ""                   # above the picture


def read(argument):
    """(label, records, the closing record) of a run."""
    label, _, path = argument.rpartition("=")
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    try:
        with open(file, encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is not JSON lines'}") from None
    closing = next((r for r in reversed(records) if "tokens" in r), None)
    if closing is None:
        raise UserError(f"{file} has no closing record; a run writes it when it ends")
    return label or os.path.basename(path.rstrip("/")).removesuffix(".jsonl"), records, closing


def main():
    s = configure(Settings)
    if not s.runs:
        raise UserError("name a run to draw, for instance out/demo_pretrain")
    if s.x not in ("step", "tokens", "flops") or s.what not in ("loss", "load"):
        raise UserError(f"x={s.x} must be step, tokens or flops, and what={s.what} loss or load")
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, argument in enumerate(s.runs):
        label, records, closing = read(argument)
        scale = 1.0
        if s.x != "step":
            scale = closing["tokens"] / closing["step"] * (6 * closing["active_parameters"] if s.x == "flops" else 1)
        colour = f"C{number}"
        if s.what == "load":
            rows = [r for r in records if "load" in r]
            if not rows:
                raise UserError(f"{argument} is no mixture of experts: its records have no load")
            for layer in range(len(rows[0]["load"])):
                for expert in range(len(rows[0]["load"][0])):
                    axes.plot([r["step"] * scale for r in rows], [r["load"][layer][expert] * len(r["load"][layer]) for r in rows],
                              colour, linewidth=0.5, alpha=0.4)
            continue
        factor = 1 / math.log(2) / s.bytes_per_token if s.bytes_per_token else 1.0
        for key, width, alpha, name in (("loss", 0.7, 0.45, None), ("val_loss", 2, 1, label)):
            points = [(r["step"] * scale, r[key] * factor) for r in records if r.get(key) is not None and r["step"] > 0]
            axes.plot(*zip(*points), colour, linewidth=width, alpha=alpha, label=name)
    axes.set_xlabel({"step": "step", "tokens": "training tokens", "flops": "training FLOPs"}[s.x])
    axes.set_ylabel("tokens of an expert / fair share" if s.what == "load" else "bits per byte" if s.bytes_per_token else "loss, nats per token")
    axes.grid(alpha=0.3)
    if s.title:
        axes.set_title(s.title)
    if s.what == "loss":
        axes.legend()
    figure.savefig(s.out, dpi=110)
    print(f"wrote {s.out}")


if __name__ == "__main__":
    run(main)
