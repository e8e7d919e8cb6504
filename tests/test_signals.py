"""A signal to stop: the step is finished, the state saved, exit 0, on every process.

A second Ctrl-C leaves at once.
"""
import itertools
import os
import signal
import time
import types

import pytest

import train
from minillm import checkpoint, interrupt
from support.processes import LIMIT
from support.training_runs import (TINY, Run, assert_same_run, die_at, finish, finish_ranks,
                                   newest, numbers, on_phase, on_step, ranks, send_itself)

LONG = [*TINY, "--checkpoint_interval=1000", "--eval_interval=0", "--max_iters=30"]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """{arguments: folder of the run with these, never interrupted}."""
    folder, made = tmp_path_factory.mktemp("straight"), {}

    def make(*argv):
        if argv not in made:
            made[argv] = folder / str(len(made))
            finish([*argv, f"--data_dir={data}", f"--out_dir={made[argv]}"])
        return made[argv]
    return make


def signal_at(step, number, times=1):
    """A function for the child, which then sends itself the signal when `step` begins."""
    def send(now):
        if now == step:
            for _ in range(times):
                send_itself(number)
    return lambda: on_step(send)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_is_finished_saved_and_exit_is_0(data, straight, tmp_path, number):
    """A signal within step 7 ends the run after step 7, at 8 finished steps; resuming is exact."""
    argv = [*LONG, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    output = finish(argv, before=signal_at(7, number))

    assert checkpoint.saved_steps(tmp_path / "out") == [8]
    assert "stopped at step 8" in output and "--init_from=resume continues it" in output
    assert "resuming at step 8" in finish([*argv, "--init_from=resume"])
    assert_same_run(straight(*LONG), tmp_path / "out")


@pytest.mark.parametrize("phase", [
    "between micro-steps", "optimizer", "checkpoint write", "evaluation"])
def test_wherever_the_signal_comes(data, straight, tmp_path, phase):
    argv = [*TINY, "--max_iters=30", "--eval_interval=7", "--eval_iters=50"]

    child = Run([*argv, f"--data_dir={data}", f"--out_dir={tmp_path}/out"],
                before=lambda: on_phase(phase, 2, lambda: send_itself(signal.SIGTERM)))

    assert child.wait() == 0, child.output
    assert "stopped at step" in child.output
    assert 1 <= newest(tmp_path / "out")["step"] < 30
    finish([*argv, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--init_from=resume"])
    assert_same_run(straight(*argv), tmp_path / "out")


def test_a_long_evaluation_is_cut_short(data, tmp_path):
    """A signal doesn't wait for the end of the validation; the resumed run does it again, whole."""
    argv = [*LONG, "--eval_interval=10", "--eval_iters=50", "--max_iters=12",
            f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    def before():
        inner, count = train.TokenData.windows, [0]

        def windows(self, indices):
            if self.split == "val":
                count[0] += 1
                # of 11 batches at step 0 and 11 at step 10: the fourth of the second
                if count[0] == 15:
                    send_itself(signal.SIGTERM)
            return inner(self, indices)
        train.TokenData.windows = windows
        write = train.RunLog.write

        def count_batches(self, record):
            if "seconds" in record:
                print(f"read {count[0]} validation batches")
            return write(self, record)
        train.RunLog.write = count_batches

    output = finish(argv, before=before)

    assert "read 15 validation batches" in output
    assert checkpoint.saved_steps(tmp_path / "out") == [10]
    assert [r["step"] for r in numbers(tmp_path / "out") if "val_loss" in r] == [0]
    finish([*argv, "--init_from=resume"])
    assert [r["step"] for r in numbers(tmp_path / "out") if "val_loss" in r] == [0, 10, 12]


def in_the_first_validation():
    on_phase("evaluation", 1, lambda: send_itself(signal.SIGINT))


def in_a_call_of(name):
    """For a Run's `before`: Ctrl-C just before train.py calls what it knows by this name."""
    def before():
        inner = getattr(train, name)

        def call(*arguments):
            send_itself(signal.SIGINT)
            return inner(*arguments)
        setattr(train, name, call)
    return before


@pytest.mark.parametrize("ctrl_c", [in_the_first_validation, in_a_call_of("rank_batches")],
                         ids=["first validation", "first batch"])
def test_a_stop_before_the_first_step_leaves_the_run_before_it(data, tmp_path, ctrl_c):
    """--overwrite=True, and Ctrl-C by somebody who saw the wrong name."""
    argv = [*LONG, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--max_iters=3"]
    finish([*argv, "--eval_interval=3"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}

    child = Run([*argv, "--overwrite=True", "--eval_interval=5"], before=ctrl_c)

    assert child.wait() == 0, child.output
    assert "stopped at step 0" in child.output and "nothing was written" in child.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")} == before
    # nor does a whole validation write
    child = Run([*argv, "--overwrite=True", "--eval_interval=5"], before=lambda: die_at(0))
    assert child.wait() == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")} == before


@pytest.mark.parametrize("who", [[0], [1], [0, 1]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_process_stops_at_the_same_step(data, tmp_path, number, who):
    """Two processes, one or both of them told: both exit 0 after the same step, and it is saved."""
    argv = [*LONG, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    before = [signal_at(7, number) if rank in who else None for rank in range(2)]

    output = finish_ranks(2, argv, before)

    assert checkpoint.saved_steps(tmp_path / "out") == [8]
    assert "stopped at step 8" in output


def two_ctrl_c(step, seconds):
    """A function for the child: two Ctrl-C at `step`, so many seconds apart by its own clock."""
    def before():
        times = itertools.count(0, seconds)
        interrupt.time = types.SimpleNamespace(monotonic=lambda: next(times))
        signal_at(step, signal.SIGINT, times=2)()
    return before


def test_a_launcher_may_repeat_a_ctrl_c(data, tmp_path):
    """torchrun passes on what the terminal has sent already: two within a second count as one."""
    argv = [*LONG, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    finish_ranks(2, argv, before=[two_ctrl_c(7, seconds=0.9)] * 2)

    assert checkpoint.saved_steps(tmp_path / "out") == [8]


def test_a_second_ctrl_c_leaves_a_job_at_once(data, tmp_path):
    argv = [*LONG, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    first, second = ranks(2, argv, before=[two_ctrl_c(7, seconds=1), None])

    assert first.wait() == 130 and second.wait() != 0
    assert checkpoint.saved_steps(tmp_path / "out") == []


def stand_still():
    """In the child: say so, and stay here; a signal does not end it.

    In naps, because Python hears of a signal that comes just before one at its end.
    """
    os.write(2, b"stands still\n")
    for _ in range(LIMIT * 100):
        time.sleep(0.01)


def stall(step):
    """A function for the child, which then begins `step` and stays in it."""
    return lambda: on_step(lambda now: stand_still() if now == step else None)


def press_ctrl_c_twice(child):
    """Where it stands still."""
    child.wait_until(lambda: "stands still" in child.err)
    child.kill(signal.SIGINT)
    child.wait_until(lambda: "SIGINT: finishing this step" in child.err)
    child.kill(signal.SIGINT)


def test_ctrl_c_twice_leaves_at_once_and_nothing_is_lost(data, straight, tmp_path):
    """Step 17 does not end: the first Ctrl-C waits for it, the second doesn't.

    What step 15 saved is whole; resuming is exact.
    """
    argv = [*TINY, "--max_iters=30", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    child = Run(argv, before=stall(17))
    press_ctrl_c_twice(child)

    assert child.wait() == 130
    assert newest(tmp_path / "out")["step"] == 15
    assert "resuming at step 15" in finish([*argv, "--init_from=resume"])
    assert_same_run(straight(*TINY, "--max_iters=30"), tmp_path / "out")


def test_ctrl_c_twice_inside_a_checkpoint(data, straight, tmp_path):
    """The write of step 15 does not end: a part of it is left under its temporary name.

    Step 10 is whole, and resuming removes the part.
    """
    def before():
        inner = os.fsync

        def fsync(handle):
            if "ckpt_00000015" in os.readlink(f"/proc/self/fd/{handle}"):
                stand_still()
            return inner(handle)
        os.fsync = fsync
    argv = [*TINY, "--max_iters=30", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    child = Run(argv, before=before)
    press_ctrl_c_twice(child)

    assert child.wait() == 130
    assert newest(tmp_path / "out")["step"] == 10
    assert os.path.exists(tmp_path / "out/ckpt_00000015.pt.tmp")
    assert "resuming at step 10" in finish([*argv, "--init_from=resume"])
    assert_same_run(straight(*TINY, "--max_iters=30"), tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp")]


def test_ctrl_c_while_starting_is_no_traceback(data, tmp_path):
    """Before the first step there is nothing to save: exit 130 without a traceback."""
    argv = [*LONG, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    child = Run(argv, before=in_a_call_of("TokenData"))

    assert child.wait() == 130
    assert "Traceback" not in child.output
    assert not os.path.exists(tmp_path / "out")
