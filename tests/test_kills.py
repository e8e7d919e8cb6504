"""A run that is killed, again and again and anywhere, ends with the bits of one that never was."""
import itertools
import random
import subprocess
import sys
import time
from collections import Counter
from typing import NamedTuple

import pytest

from minillm import checkpoint
from support import ROOT
from support.call_clock import CallClock
from support.training_runs import (MOE, TINY, Run, assert_same_run, finish, make_data, numbers,
                                   on_phase)


class Phase(NamedTuple):
    """Where kills come: up to so many calls of functions after the start of the phase."""
    name: str
    times: int                   # a kill comes at the latest when the phase begins so many times
    calls: int                   # about as many as the phase takes


PHASES = [
    Phase("start", 1, 50_000),
    Phase("step", 30, 2800),
    Phase("between micro-steps", 30, 3500),
    Phase("optimizer", 15, 1100),
    Phase("checkpoint write", 4, 17_000),
    Phase("evaluation", 2, 4500),
]


def draw_kill(draw, phase):
    """A function for the child, which is then killed at a moment of the phase."""
    clock = CallClock()
    time = draw.randrange(phase.times) + 1
    last = draw.randrange(phase.calls) + 1
    if phase.name == "start":
        return lambda: clock.start(last)
    return lambda: on_phase(phase.name, time, lambda: clock.start(last))


def kill_and_resume(argv, folder, kills, seed):
    """Start, SIGKILL, resume, SIGKILL ... until `kills` kills are done; then let the run end.

    The phases take turns, in an order that `seed` draws. A run that ends before its kill starts
    over in a fresh folder: its kills count, and its end is compared too. Returns ({phase: kills},
    number of finished runs compared).
    """
    finish([*argv, f"--out_dir={folder}/straight"])
    draw = random.Random(seed)
    phases = itertools.cycle(draw.sample(PHASES, len(PHASES)))
    hit, compared = Counter(), 0
    while True:
        out = f"{folder}/killed_{compared}"
        start = "--init_from=resume" if checkpoint.saved_steps(out) else "--overwrite=True"
        before = None
        if hit.total() < kills:
            before = draw_kill(draw, next(phases))
        child = Run([*argv, f"--out_dir={out}", start], before=before)
        if child.wait() == -9:
            hit[child.phase()] += 1
            continue
        assert child.status == 0, child.output
        assert_same_run(f"{folder}/straight", out)
        compared += 1
        if hit.total() >= kills:
            return hit, compared


class Kind(NamedTuple):
    name: str
    flags: list


KINDS = [
    Kind("dense", []),
    Kind("moe bf16", [*MOE, "--dtype=bfloat16"]),
    Kind("dense fp16", ["--dtype=float16"]),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_killed_runs_resume_exactly(data, tmp_path, kind):
    """Dropout, router noise, accumulation, the schedule, the loss scale: six kills each."""
    argv = [*TINY, *kind.flags, f"--data_dir={data}", "--max_iters=40", "--eval_interval=10"]

    kill_and_resume(argv, tmp_path, kills=6, seed=kind.name)

    records = numbers(tmp_path / "straight")
    assert len(records) == 45 and records[0]["val_loss"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_battery_of_kills(data, tmp_path, kind, dtype, compile, capsys):
    """The long one: 24 kills of 60 steps for each of dense/MoE, float32/bf16, compile off/on.

    Prints its figures.
    """
    argv = [*TINY, f"--dtype={dtype}", f"--compile={compile}", f"--data_dir={data}"]
    if kind == "moe":
        argv += MOE
    # what is compiled once is found on disk later
    finish([*argv, f"--out_dir={tmp_path}/warm"])

    hit, compared = kill_and_resume(argv, tmp_path, 24, f"{kind} {dtype} {compile}")

    places = ", ".join(f"{count} in {phase}" for phase, count in hit.items())
    with capsys.disabled():
        print(f"\n{kind} {dtype} compile={compile}: {hit.total()} kills ({places}), "
              f"{compared} runs finished, all bit-identical")


# ---- on a GPU, with train.py as a user starts it

GPU = ["--n_layer=12", "--n_head=16", "--n_kv_head=8", "--n_embd=1024", "--block_size=512",
       "--vocab_size=32000", "--batch_size=32", "--gradient_accumulation_steps=2", "--dropout=0.1",
       "--learning_rate=6e-4", "--min_lr=6e-5", "--warmup_iters=10", "--max_iters=60",
       "--log_interval=1", "--eval_interval=20", "--eval_iters=5", "--checkpoint_interval=10",
       "--save_best=False", "--compile", "--deterministic"]


@pytest.mark.slow
@pytest.mark.gpu
def test_kills_on_a_gpu(tmp_path, capsys):
    """Killed after 4 numbers of logged records, drawn at random, and a moment more."""
    data = make_data(tmp_path / "data", train=2_000_000, val=100_000, block_size=512)
    command = [sys.executable, "train.py", *GPU, f"--data_dir={data}"]
    out = tmp_path / "killed"
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
    subprocess.run([*command, f"--out_dir={tmp_path}/straight"], check=True, **quiet)
    steps = len(numbers(tmp_path / "straight"))
    command.append(f"--out_dir={out}")
    draw, done = random.Random(1), []

    for moment in sorted(draw.sample(range(steps // 5, steps), 4)):
        start = "--init_from=resume" if checkpoint.saved_steps(out) else "--overwrite"
        child = subprocess.Popen([*command, start], **quiet)
        while child.poll() is None and count_records(out) < moment:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        child.kill()
        if child.wait() == -9:
            done.append(moment)
    subprocess.run([*command, "--init_from=resume"], check=True, **quiet)

    assert_same_run(tmp_path / "straight", out)
    assert done                                  # the last may come too late
    with capsys.disabled():
        print(f"\n{len(done)} kills, after {', '.join(map(str, done))} of {steps} records: "
              "every loss, weight and moment bit-identical")


def count_records(out_dir):
    """The whole lines of metrics.jsonl, which may not be there yet."""
    try:
        with open(out_dir / "metrics.jsonl", "rb") as file:
            return file.read().count(b"\n")
    except FileNotFoundError:
        return 0
