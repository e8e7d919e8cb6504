"""The table at the end of `make demo`: what was trained, how long it took, what came out.

    python -m demo.report demo          # or demo_moe
    python -m demo.report demo stale    # the eval.json files that the table cannot use
"""
import json
import os
import sys

from minillm.errors import UserError, run

TITLES = {"pretrain": "pretraining", "sft": "SFT", "control": "control: SFT alone"}
HEAD = ["", "parameters", "tokens", "seconds", "loss", "val loss", "exact match"]
ROW = "{:20}{:>12}{:>12}{:>9}{:>9}{:>10}{:>13}"
END = """
Exact match: greedy answers to questions about people that SFT never mentioned. Only the pretraining
text says who they are; without pretraining the same SFT can only guess.

Talk to it:        .venv/bin/python chat.py --out_dir=out/{name}_sft
Let it continue:   .venv/bin/python sample.py --out_dir=out/{name}_pretrain --prompt=沈琴明
Start over:        make clean-demo demo
"""


def read_run(folder):
    """The last value of every key in a run's metrics.jsonl."""
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make demo writes it") from None
    last = {}
    for record in records:
        last |= record
    if "seconds" not in last:
        raise UserError(f"{folder} has not ended: make demo trains it")
    return last


def exact_match(folder, step):
    """The share of right answers, empty without an evaluation of it on the demo."""
    try:
        with open(os.path.join(folder, "eval.json"), encoding="utf-8") as file:
            results = json.load(file)
        is_this = results["step"] == step and results["questions_file"] == "demo"
        return f"{results['exact_match']:.1%}" if is_this else ""
    except (OSError, ValueError, KeyError):
        return ""


def stale(name):
    """The files of evaluations of another step, or with other questions than the demo's."""
    files = []
    for folder in (f"out/{name}_sft", f"out/{name}_control"):
        try:
            known = exact_match(folder, read_run(folder)["step"])
        except UserError:                        # not trained yet
            continue
        if not known and os.path.exists(f"{folder}/eval.json"):
            files.append(f"{folder}/eval.json")
    return files


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    if sys.argv[2:] == ["stale"]:
        print(*stale(name))
        return
    runs = {stage: read_run(f"out/{name}_{stage}") for stage in TITLES}
    print()
    print(ROW.format(*HEAD))
    for stage, last in runs.items():
        print(ROW.format(TITLES[stage], f"{last['active_parameters']:,}", f"{last['tokens']:,}",
                         f"{last['seconds']:.0f}", f"{last['loss']:.4f}", f"{last['val_loss']:.4f}",
                         exact_match(f"out/{name}_{stage}", last["step"])))
    print(END.format(name=name))


if __name__ == "__main__":
    run(main)
