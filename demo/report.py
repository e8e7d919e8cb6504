"""The table at the end of `make demo`: what was trained, how long it took, what came out.

    python -m demo.report demo          # or demo_moe
"""
import json
import os
import sys

from minillm.errors import UserError, run


def last_record(folder):
    """The closing record of a run's metrics.jsonl and its last training and validation losses."""
    try:
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    except OSError as error:
        raise UserError(f"cannot read {folder}/metrics.jsonl: {error.strerror}; make demo writes it") from None
    end = next((r for r in reversed(records) if "seconds" in r), {})
    return end | {key: next((r[key] for r in reversed(records) if key in r), None) for key in ("loss", "val_loss")}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    stages = [(f"out/{name}_pretrain", "pretraining"), (f"out/{name}_sft", "SFT"), (f"out/{name}_control", "control: SFT alone")]
    print(f"\n{'':20}{'parameters':>12}{'tokens':>12}{'seconds':>9}{'loss':>9}{'val loss':>10}{'exact match':>13}")
    for folder, title in stages:
        end = last_record(folder)
        try:
            with open(os.path.join(folder, "eval.json"), encoding="utf-8") as file:
                match = f"{json.load(file)['exact_match']:.1%}"
        except (OSError, KeyError):
            match = ""
        print(f"{title:20}{end['active_parameters']:>12,}{end['tokens']:>12,}{end['seconds']:>9.0f}{end['loss']:>9.4f}{end['val_loss']:>10.4f}{match:>13}")
    print("\nExact match: greedy answers to questions about people that SFT never mentioned. What they are, only the\n"
          "pretraining text says; without pretraining the same SFT can but guess.\n\n"
          f"Talk to it:        .venv/bin/python chat.py --out_dir=out/{name}_sft\n"
          f"Let it go on:      .venv/bin/python sample.py --out_dir=out/{name}_pretrain --prompt=沈琴明\n"
          "Start over:        make clean-demo demo\n")


if __name__ == "__main__":
    run(main)
