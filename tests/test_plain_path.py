"""The plain path: without minillm/speed everything runs and gives the same numbers.

A copy of the repository, once whole and once without minillm/speed, trains and generates in a
process of its own: train.py for a dense model and an MoE model, then sampled and greedy text from
both.
"""
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import train
from minillm.errors import UserError
from support import ROOT
from support.processes import LIMIT
from support.training_runs import MOE, TINY, make_data

PROGRAM = """
import json, sys, torch
import train, model
data = sys.argv[-1]
for kind, extra in (("dense", []), ("moe", %r)):
    sys.argv = ["train.py", *%r, "--max_iters=5", "--eval_interval=5", "--dropout=0", *extra,
                "--data_dir=" + data, "--out_dir=out/" + kind]
    train.main()
    gpt = model.GPT.from_checkpoint("out/" + kind, device="cpu", dtype="float32")
    prompts = [[5, 6, 7], [9, 4, 30, 31, 32]]
    sampled = list(gpt.generate(prompts, 20, temperature=0.9, top_k=8, repetition_penalty=1.1))
    alone = list(gpt.generate(prompts[1], 20, temperature=0))
    logits = gpt(torch.tensor([[5, 6, 7, 8]]))[0, -1].tolist()
    print("RESULT", json.dumps([kind, model.fast_versions is not None, sampled, alone, logits]))
"""


def results(folder, data):
    """[(kind, were twins used, sampled ids, greedy ids, logits)], and the losses of each kind."""
    program = PROGRAM % (MOE, TINY)
    done = subprocess.run([sys.executable, "-c", program, data], cwd=folder, capture_output=True,
                          text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    losses = {}
    for kind in ("dense", "moe"):
        records = (folder / "out" / kind / "metrics.jsonl").read_text().splitlines()
        losses[kind] = [record["loss"] for record in map(json.loads, records) if "loss" in record]
    return [json.loads(line) for line in lines], losses


def copy_repository(folder, with_speed):
    for path in pathlib.Path(ROOT).glob("*.py"):
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    ignore = shutil.ignore_patterns("__pycache__", *([] if with_speed else ["speed"]))
    for name in ("minillm", "demo"):
        shutil.copytree(pathlib.Path(ROOT, name), folder / name, ignore=ignore)
    return folder


def test_without_speed_the_same_numbers(tmp_path):
    data = make_data(tmp_path / "data")
    whole = copy_repository(tmp_path / "whole", with_speed=True)
    plain = copy_repository(tmp_path / "plain", with_speed=False)

    (fast, fast_losses), (slow, slow_losses) = results(whole, data), results(plain, data)

    assert [kind for kind, *_ in fast] == [kind for kind, *_ in slow] == ["dense", "moe"]
    assert [twins for _, twins, *_ in fast] == [True, True]
    assert [twins for _, twins, *_ in slow] == [False, False]
    for kind in ("dense", "moe"):
        assert len(fast_losses[kind]) == 5
        assert slow_losses[kind] == pytest.approx(fast_losses[kind], rel=1e-5)
    for (_, _, sampled, alone, logits), (_, _, *theirs) in zip(fast, slow):
        assert [sampled, alone] == theirs[:2]
        assert logits == pytest.approx(theirs[2], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("settings, world", [
    ({"fp8": True}, 1), ({"compile": True, "gradient_accumulation_steps": 2}, 2)])
def test_what_needs_the_folder_is_refused(monkeypatch, settings, world):
    """One process can compile without it."""
    train.check(train.Settings(**settings), world)
    monkeypatch.setattr(train, "fast_versions", None)
    train.check(train.Settings(compile=True), 1)

    with pytest.raises(UserError, match="need minillm/speed, which was deleted"):
        train.check(train.Settings(**settings), world)
