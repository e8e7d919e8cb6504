"""Steps that are not finite.

Skipped by all processes alike, counted, logged, and in the end explained.
"""
import math
import os

import pytest
import torch

import train
from minillm import checkpoint
from minillm.dataloader import TokenData, batch_windows
from model import GPT
from minillm.tokenizer import Tokenizer
from support.training_runs import (BLOCK, TINY, Run, finish, keep_weights, make_data, newest,
                                   numbers, on_step, ranks, refused)

EVERY_STEP = ["--checkpoint_interval=1", "--keep_checkpoints=99", "--eval_interval=0"]


def spoil(how, steps):
    """In the child.

    Make loss or gradient of the given steps' second micro-batch (or of the only one) not finite.
    """
    def before():
        now, micro = [-1], [0]

        def begin(step):
            now[0], micro[0] = step, 0
        on_step(begin)
        inner = GPT.forward

        def forward(self, *args, **kwargs):
            loss, moe = inner(self, *args, **kwargs)
            micro[0] += 1
            if self.training and now[0] in steps and (micro[0] == 2 or "RANK" in os.environ):
                if how == "gradient":
                    loss.register_hook(lambda gradient: gradient * math.inf)
                else:                            # the loss alone: its gradient would be finite
                    loss = loss + {"nan": math.nan, "inf": math.inf}[how]
            return loss, moe
        GPT.forward = forward
    return before


def assert_step_changed_nothing(out_dir, step):
    before, after = (checkpoint.load(checkpoint.step_path(out_dir, at)) for at in (step, step + 1))
    for name, value in before["model"].items():
        assert torch.equal(value, after["model"][name]), name
    for i, moments in before["optimizer"].items():
        for name, value in moments.items():
            assert torch.equal(value, after["optimizer"][i][name]), (i, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(data, tmp_path, how, dtype):
    """Weights, moments and the optimizer's count of steps stay to the bit.

    It is logged though no log line was due.
    """
    argv = [*TINY, *EVERY_STEP, f"--dtype={dtype}", "--max_iters=6", "--log_interval=50",
            f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    output = finish(argv, before=spoil(how, {3}))
    assert_step_changed_nothing(tmp_path / "out", 3)
    records = {record["step"]: record for record in numbers(tmp_path / "out")}
    assert set(records) == {0, 3, 5}
    assert records[3]["loss" if how != "gradient" else "grad_norm"] is None
    assert records[0]["skipped"] == 0
    assert records[3]["skipped"] == records[5]["skipped"] == 1
    assert "not finite, update skipped (1 so far)" in output
    assert newest(tmp_path / "out")["bad_steps"] == [0, 1]
    before = checkpoint.load(checkpoint.step_path(tmp_path / "out", 4))["model"]["wte.weight"]
    assert not torch.equal(newest(tmp_path / "out")["model"]["wte.weight"], before)


@pytest.mark.parametrize("how", ["nan", "gradient"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_processes_skip_together(data, tmp_path, how, dtype):
    """Only rank 1 of 2 has a step that is not finite.

    Afterwards both still hold the same weights.
    """
    def keep(rank):
        def before():
            spoil(how, {3} if rank == 1 else set())()
            keep_weights(f"{tmp_path}/weights_{rank}")
        return before
    argv = [*TINY, *EVERY_STEP, f"--dtype={dtype}", "--max_iters=6",
            f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    children = ranks(2, argv, before=[keep(0), keep(1)])
    assert [child.wait() for child in children] == [0, 0], children[0].output
    assert_step_changed_nothing(tmp_path / "out", 3)
    assert [record["skipped"] for record in numbers(tmp_path / "out")] == [0, 0, 0, 1, 1, 1]
    a, b = (torch.load(f"{tmp_path}/weights_{rank}") for rank in range(2))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(a, b, strict=True))


def test_too_many_in_a_row_stop_the_run_and_name_the_windows(data, tmp_path):
    """The line names step and windows.

    --inspect_step prints just these windows as text, and touches nothing.
    """
    argv = [*TINY, "--max_bad_steps=3", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    # the lone one doesn't count: it was followed by good ones
    line = refused(argv, before=spoil("nan", {2, 7, 8, 9, 10}))
    windows = batch_windows(1337, 9, 4, 124).tolist()
    assert ("stopped at step 9, the last of 3 in a row without a finite loss and gradient; "
            f"its windows: {windows}") in line
    assert "--inspect_step=9" in line
    assert checkpoint.saved_steps(tmp_path / "out") == [5]

    files = sorted(os.listdir(tmp_path / "out"))
    child = Run([*argv, "--inspect_step=9"])
    assert child.wait() == 0 and sorted(os.listdir(tmp_path / "out")) == files
    tokens, tokenizer = TokenData(data, "train", BLOCK), Tokenizer.load(f"{data}/tokenizer")
    for window in windows:
        ids = tokens.tokens[window * BLOCK: window * BLOCK + BLOCK + 1].tolist()
        text = tokenizer.decode(ids, skip_special=False)
        assert f"--- window {window}: {BLOCK} supervised tokens\n{text}\n" in child.output


def test_a_resumed_run_that_now_allows_fewer_stops_at_once(data, tmp_path):
    """The steps in a row are counted on; the newest of them is the one before the checkpoint."""
    argv = [*TINY, "--eval_interval=0", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--max_iters=5"], before=spoil("nan", {3, 4}))

    line = refused([*argv, "--init_from=resume", "--max_bad_steps=2"])

    assert "stopped at step 4, the last of 2 in a row" in line
    assert "--inspect_step=4" in line


def test_inspect_step_marks_what_is_learned(tmp_path):
    data = make_data(tmp_path / "data", "sft")
    output = finish([*TINY, "--inspect_step=0", f"--data_dir={data}", f"--out_dir={tmp_path}/out"])
    tokens, tokenizer = TokenData(data, "train", BLOCK), Tokenizer.load(f"{data}/tokenizer")
    window = int(batch_windows(1337, 0, 4, tokens.n_windows)[0])
    learned = (tokens.windows([window])[1][0] >= 0).tolist()
    at = learned.index(True)
    end = next((i for i in range(at, BLOCK) if not learned[i]), BLOCK)
    ids = tokens.tokens[window * (BLOCK + 1):][1 + at: 1 + end].tolist()
    assert f"--- window {window}: {sum(learned)} supervised tokens" in output
    assert f"⟦{tokenizer.decode(ids, skip_special=False)}⟧" in output
    assert not os.path.exists(tmp_path / "out")


def test_all_processes_stop_together(data, tmp_path):
    argv = [*TINY, "--max_bad_steps=2", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    children = ranks(2, argv, before=[None, spoil("gradient", {6, 7})])
    assert [child.wait() for child in children] == [2, 2]
    assert all("stopped at step 7, the last of 2 in a row" in child.output for child in children)


def read_late():
    """In the child: a step's numbers wait until somebody asks for them, as on a GPU."""
    def step(log, *numbers):
        log.catch_up()
        log.waiting = *numbers, None
    train.RunLog.step = step


def test_numbers_that_are_read_a_step_late_are_the_same(data, tmp_path):
    """A validation is logged after the step before it; a checkpoint counts the bad one before."""
    argv = [*TINY, "--max_iters=8", "--eval_interval=7", f"--data_dir={data}"]

    def late():
        read_late()
        spoil("nan", {4})()
    finish([*argv, f"--out_dir={tmp_path}/out"], before=spoil("nan", {4}))
    finish([*argv, f"--out_dir={tmp_path}/late"], before=late)

    assert numbers(tmp_path / "out") == numbers(tmp_path / "late")
    for out in ("out", "late"):
        path = checkpoint.step_path(tmp_path / out, 5)
        assert checkpoint.load(path)["bad_steps"] == [1, 1]


def test_the_norm_is_that_of_the_gradient_without_the_loss_scale(data, tmp_path):
    """In float16 as in float32: it is what grad_clip is compared with."""
    norms = []
    for dtype in ("float32", "float16"):
        finish([*TINY, "--max_iters=1", "--eval_interval=0", "--dropout=0", f"--dtype={dtype}",
                f"--data_dir={data}", f"--out_dir={tmp_path}/{dtype}"])
        norms.append(numbers(tmp_path / dtype)[0]["grad_norm"])

    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_the_loss_scale_is_in_the_checkpoint(data, tmp_path):
    """float16: an overflow halves the scale.

    The next run takes over both it and the count of good steps since.
    """
    argv = [*TINY, "--dtype=float16", "--eval_interval=0", "--checkpoint_interval=0",
            f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--max_iters=5"], before=spoil("gradient", {2}))
    saved = newest(tmp_path / "out")["scaler"]
    assert saved["scale"] == 2.0**15 and saved["_growth_tracker"] == 2
    finish([*argv, "--max_iters=8", "--init_from=resume"])
    saved = newest(tmp_path / "out")["scaler"]
    assert saved["scale"] == 2.0**15 and saved["_growth_tracker"] == 5
    assert newest(tmp_path / "out")["bad_steps"] == [0, 1]


@pytest.mark.parametrize("first, then", [("float32", "float16"), ("float16", "float32")])
def test_a_run_resumes_in_another_number_type(data, tmp_path, first, then):
    """Only float16 has a loss scale to keep."""
    argv = [*TINY, "--eval_interval=0", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--max_iters=2", f"--dtype={first}"])

    finish([*argv, "--max_iters=4", f"--dtype={then}", "--init_from=resume"])

    saved = newest(tmp_path / "out")
    assert saved["step"] == 4 and ("scale" in saved["scaler"]) == (then == "float16")
