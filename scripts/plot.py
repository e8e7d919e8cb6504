"""Draw metrics.jsonl, the record that every run leaves in its folder.

    python scripts/plot.py out/pretrain                        # loss over tokens
    python scripts/plot.py out/pretrain --watch                # again and again while it trains
    python scripts/plot.py dense=out/pretrain moe=out/moe_pretrain --x=flops --bytes_per_token=4.23
    python scripts/plot.py out/moe_pretrain --what=load        # how the experts share the work

A run is a folder or a .jsonl file, with label= before it where the folder's name will not do. It
may still be going on, or have been killed. The picture of one run lies beside its metrics.jsonl, of
several in the current folder; --out=FILE puts it elsewhere. Training losses are thin lines,
validation losses thick ones. With bytes_per_token (bytes / tokens of the split in meta.json) losses
are bits per byte. Needs `pip install matplotlib`.
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported

from minillm.atomic_folder import replaced_file
from minillm.configurator import NonNegativeFloat, configure, positional
from minillm.errors import UserError, run

X_LABELS = {"step": "step", "tokens": "training tokens", "flops": "training FLOPs"}
PAUSE = 5                             # seconds between two looks at a run that goes on
# for names of runs that matplotlib's own font cannot show; those that are installed, in this order
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "Hiragino Sans GB",
                 "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei")


@dataclass
class Settings:
    runs: list[str] = positional()    # folders or .jsonl files, each perhaps as label=PATH
    out: str = ""                     # the picture; empty: loss.png or load.png, see above
    what: Literal["loss", "load"] = "loss"               # load: tokens of each expert of an MoE
    x: Literal["step", "tokens", "flops"] = "tokens"     # flops: 6 × active parameters × tokens
    bytes_per_token: NonNegativeFloat = 0.0              # above 0: draw bits per byte
    title: str = ""                   # above the picture
    watch: bool = False               # draw it anew whenever there is more, until the runs end


class Run:
    """The records of one run, and what they say of it as a whole."""

    def __init__(self, argument):
        label, path = label_and_path(argument)
        self.label = label or os.path.basename(path.rstrip("/")).removesuffix(".jsonl")
        self.file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
        self.records = read_records(self.file)
        self.has_ended = bool(self.records) and "seconds" in self.records[-1]

    def last_with(self, key):
        """The last record after the first step that has this key."""
        for record in reversed(self.records):
            if record.get(key) is not None and record["step"] > 0:
                return record
        raise UserError(f"{self.file} does not count {key} yet: give --x=step")

    def tokens_at(self, record):
        """Training tokens up to a record. Older runs count them only at their end."""
        if record.get("tokens") is not None:
            return record["tokens"]
        counted = self.last_with("tokens")
        return record["step"] * counted["tokens"] / counted["step"]

    def active_parameters(self):
        """Those that a token passes through: in a run's first record, and in its last."""
        for record in self.records:
            if record.get("active_parameters") is not None:
                return record["active_parameters"]
        raise UserError(f"{self.file} does not count parameters: give --x=tokens")

    def points(self, key, x):
        """[(x, value)] of every record after the first step that has this key."""
        records = [r for r in self.records if r.get(key) is not None and r["step"] > 0]
        if x == "step":
            places = [record["step"] for record in records]
        else:
            places = [self.tokens_at(record) for record in records]
        if x == "flops":
            places = [6 * self.active_parameters() * tokens for tokens in places]
        return list(zip(places, (record[key] for record in records)))


def label_and_path(argument):
    """The two parts of label=PATH. Either may hold a "=" itself: the path is what is there."""
    parts = argument.split("=")
    for start in range(len(parts)):
        path = "=".join(parts[start:])
        if os.path.exists(path):
            return "=".join(parts[:start]), path
    label, _, path = argument.rpartition("=")
    return label, path


def read_records(path):
    """The records of a file; half a line at its end is still being written."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        raise UserError(f"cannot read {path}: it is not JSON lines") from None
    for number, record in enumerate(records, 1):
        check_record(record, f"{path}:{number}")
    return records


def check_record(record, place):
    """Raise UserError unless a record holds what train.py writes, for all that is drawn."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise UserError(f"{place} is not of the metrics.jsonl of a run: it has no step")
    for key in ("step", "loss", "val_loss", "tokens", "active_parameters"):
        if not (record.get(key) is None or is_number(record[key])):
            raise UserError(f"{place} is not of the metrics.jsonl of a run: {key} is no number")
    layers = record.get("load", [[0]])
    if isinstance(layers, list) and all(isinstance(layer, list) for layer in layers):
        if all(len(layer) == len(layers[0]) and all(map(is_number, layer)) for layer in layers):
            return
    raise UserError(f"{place} is not of the metrics.jsonl of a run: load is not as train.py "
                    "writes it")


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e18


def draw_loss(axes, run, colour, s):
    factor = 1 / math.log(2) / s.bytes_per_token if s.bytes_per_token else 1.0
    for key, style in (("loss", {"linewidth": 0.7, "alpha": 0.45}),
                       ("val_loss", {"linewidth": 2, "label": run.label})):
        points = run.points(key, s.x)
        axes.plot([x for x, _ in points], [loss * factor for _, loss in points], colour, **style)
    axes.set_ylabel("bits per byte" if s.bytes_per_token else "loss, nats per token")
    axes.legend()


def draw_load(axes, run, colour, s):
    points = run.points("load", s.x)
    if not points:
        raise UserError(f"{run.file} has no load: it is not of an MoE, or has not begun")
    for layer in range(len(points[0][1])):
        experts = len(points[0][1][layer])
        for expert in range(experts):
            shares = [load[layer][expert] * experts for _, load in points]
            axes.plot([x for x, _ in points], shares, colour, linewidth=0.5, alpha=0.4)
    axes.set_ylabel("tokens of an expert / fair share")


def draw(runs, s):
    """Write the picture; who looks at it never sees half of it."""
    from matplotlib import font_manager, rcParams                   # optional, named in main
    from matplotlib.backends.backend_agg import FigureCanvasAgg     # optional, named in main
    from matplotlib.figure import Figure                            # optional, named in main
    installed = font_manager.get_font_names()
    chinese = [font for font in CHINESE_FONTS if font in installed]
    rcParams["font.family"] = ["sans-serif", *chinese]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, run in enumerate(runs):
        if s.what == "load":
            draw_load(axes, run, f"C{number}", s)
        else:
            draw_loss(axes, run, f"C{number}", s)
    axes.set_xlabel(X_LABELS[s.x])
    axes.set_title(s.title)
    axes.grid(alpha=0.3)
    kind = os.path.splitext(s.out)[1].removeprefix(".") or "png"
    try:
        with replaced_file(s.out) as new:
            figure.savefig(new, dpi=110, format=kind)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"cannot write {s.out}: {reason}") from None


def default_out(runs, what):
    """loss.png or load.png, beside the only run or in the current folder."""
    folder = os.path.dirname(runs[0].file) if len(runs) == 1 else ""
    return os.path.join(folder, f"{what}.png")


def main():
    s = configure(Settings)
    if not s.runs:
        raise UserError("name a run to draw, for instance out/demo_pretrain")
    try:
        import matplotlib             # optional: only drawing needs it
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    runs = [Run(argument) for argument in s.runs]
    s.out = s.out or default_out(runs, s.what)
    draw(runs, s)
    print(f"wrote {s.out}", flush=True)
    while s.watch and not all(run.has_ended for run in runs):
        time.sleep(PAUSE)
        before = runs
        runs = [Run(argument) for argument in s.runs]
        if [run.records for run in runs] != [run.records for run in before]:
            draw(runs, s)


if __name__ == "__main__":
    run(main)
