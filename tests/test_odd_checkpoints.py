"""Checkpoints that contradict themselves or are of another version, and odd things in out_dir."""
import math
import os
import subprocess
import sys

import pytest
import torch

from minillm import checkpoint, run_folder
from minillm.errors import UserError
from model import GPT
from support.training_runs import TINY, finish, make_data, newest, on_step, refused

SHORT = [*TINY, "--max_iters=6", "--eval_interval=3"]


def spoil_config(**changes):
    return lambda state: state["model_config"].update(changes)


def drop(name):
    return lambda state: state["model"].pop(name)


@pytest.mark.parametrize("spoil, says", [
    (spoil_config(n_wings=2), "model_config has an unknown key 'n_wings'"),
    (spoil_config(n_layer="two"), "model_config has n_layer='two', which is not of type int"),
    (spoil_config(n_embd=None), "model_config has n_embd=None, which is not of type int"),
    (spoil_config(bias=0), "model_config has bias=0, which is not of type bool"),
    (spoil_config(block_size=10**30), r"block_size=\(a number of 100 bits\), which is too large"),
    (spoil_config(n_layer=10**9), "n_layer=1000000000, but the file holds only"),
    (spoil_config(n_layer=3), "blocks.2.* is missing"),
    (spoil_config(n_layer=1), "blocks.1.* is unknown"),
    (spoil_config(n_head=3), "model_config: n_embd=32 is not divisible by n_head=3"),
    (spoil_config(vocab_size=301), r"wte.weight is .* of shape \(300, 32\), not \(301, 32\)"),
    (drop("norm.weight"), "norm.weight is missing"),
    (lambda state: state["model"].update({"norm.weight": torch.ones(32).to_sparse()}),
     "norm.weight holds no plain numbers"),
    (lambda state: state["model"].update({"norm.weight": 3}), "norm.weight is missing"),
    (lambda state: state["model"].update({"norm.weight": torch.ones(32).int()}), "torch.int32"),
])
def test_a_model_that_contradicts_itself_is_one_line(data, tmp_path, spoil, says):
    finish([*SHORT, "--max_iters=1", "--eval_interval=0", f"--data_dir={data}",
            f"--out_dir={tmp_path}/out"])
    path = checkpoint.step_path(tmp_path / "out", 1)
    state = torch.load(path)
    spoil(state)
    torch.save(state, path)

    with pytest.raises(UserError, match=says) as error:
        GPT.from_checkpoint(str(tmp_path / "out"), device="cpu")

    assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    {"step": -1}, {"step": True}, {"step": 10**18}, {"bad_steps": [0]}, {"bad_steps": [0, None]},
    {"best_val_loss": math.nan}, {"best_val_loss": 3}, {"settings": None}, {"scaler": []}])
def test_a_state_that_makes_no_sense_is_passed_over(data, tmp_path, changes):
    argv = [*SHORT, "--checkpoint_interval=3", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish(argv)
    path = checkpoint.step_path(tmp_path / "out", 6)
    torch.save(torch.load(path) | changes, path)

    output = finish([*argv, "--init_from=resume"])

    key = next(iter(changes))
    assert f"ckpt_00000006.pt is not a checkpoint to resume from: no {key} in it" in output
    assert "resuming at step 3" in output


@pytest.mark.parametrize("changes", [
    {"scaler": {"scale": 1.0}}, {"settings": {}}, {"settings": {"keep_checkpoints": None}},
    {"settings": {"init_from": 7, "optimizer": None}}, {"optimizer": {}},
    {"tokens": None, "seconds": "long", "trackers": 3}, {"tokens": math.nan, "seconds": -1.0},
    {"tokens": 10**400, "seconds": math.inf, "trackers": []}])
def test_a_state_of_another_version_resumes(data, tmp_path, changes):
    """What a checkpoint lacks, or holds of another type, and nobody needs: the defaults."""
    argv = [*SHORT, "--dtype=float16", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--max_iters=3"])
    path = checkpoint.step_path(tmp_path / "out", 3)
    state = torch.load(path)
    for key in ("tokens", "seconds", "trackers"):
        del state[key]
    torch.save(state | changes, path)

    assert "done at step 6" in finish([*argv, "--init_from=resume"])


def test_a_checkpoint_that_knows_a_setting_not_yet_has_what_was_usual_then(data, tmp_path):
    """keep_checkpoints=None would keep none."""
    argv = [*SHORT, "--eval_interval=0", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--max_iters=5"])
    path = checkpoint.step_path(tmp_path / "out", 5)
    state = checkpoint.load(path)
    for key in run_folder.KEPT:
        del state["settings"][key]
    checkpoint.save(path, state)

    finish([*argv, "--max_iters=6", "--init_from=resume"])

    settings = run_folder.read_settings(tmp_path / "out")
    assert {key: settings[key] for key in run_folder.KEPT} == run_folder.KEPT
    assert checkpoint.saved_steps(tmp_path / "out") == [6, 5]


@pytest.mark.parametrize("which", ["best", "3", "newest"])
def test_a_file_has_no_checkpoint_to_choose(data, tmp_path, which):
    argv = [*SHORT, f"--data_dir={data}", "--eval_interval=0"]
    finish([*argv, f"--out_dir={tmp_path}/out"])
    argv += [f"--init_from={checkpoint.step_path(tmp_path / 'out', 6)}", f"--checkpoint={which}",
             f"--out_dir={tmp_path}/new"]

    if which == "newest":
        finish(argv)
    else:
        assert f"checkpoint={which} names one of a folder" in refused(argv)


def test_what_a_fine_tuning_run_does_not_take_over_is_said(data, tmp_path):
    argv = [flag for flag in SHORT if not flag.startswith(("--block_size", "--dropout"))]
    argv += ["--eval_interval=0", "--max_iters=1", f"--data_dir={data}"]
    finish([*argv, "--block_size=64", "--dropout=0.2", f"--out_dir={tmp_path}/out"])
    argv += [f"--init_from={tmp_path}/out", "--overwrite=True", f"--out_dir={tmp_path}/new"]

    silent = finish([*argv, "--block_size=32", "--dropout=0"])
    output = finish(argv)

    assert "the checkpoint had" not in silent
    assert "block_size=128 from here on; the checkpoint had 64: --block_size=64 keeps it" in output
    assert "dropout=0.0 from here on; the checkpoint had 0.2" in output


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.py", "metrics.jsonl.tmp"])
def test_a_folder_in_the_place_of_a_file_is_one_line(data, tmp_path, name):
    os.makedirs(tmp_path / "out" / name / "inside")
    (tmp_path / "out/.lock").touch()             # of a run that ended before its first step

    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"])

    assert f"cannot write to {tmp_path}/out: " in line and name in line


def test_a_pipe_in_the_place_of_metrics_does_not_wait(data, tmp_path):
    """Nobody is at its other end: opening it would never return, not even on SIGTERM."""
    os.mkdir(tmp_path / "out")
    os.mkfifo(tmp_path / "out/metrics.jsonl")

    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"])

    assert f"cannot write to {tmp_path}/out: {tmp_path}/out/metrics.jsonl: it is not a file" in line


def test_a_new_out_dir_may_hold_what_the_shell_and_the_system_put_there(data, tmp_path):
    """As of `python train.py > out/train.log`. Anything else is somebody's."""
    argv = [*SHORT, "--max_iters=1", "--eval_interval=0", f"--data_dir={data}"]
    os.mkdir(tmp_path / "out")
    for name in ("train.log", ".DS_Store"):
        (tmp_path / "out" / name).touch()

    finish([*argv, f"--out_dir={tmp_path}/out"])

    os.mkdir(tmp_path / "other")
    (tmp_path / "other/thesis.txt").touch()
    assert "holds other things (thesis.txt" in refused([*argv, f"--out_dir={tmp_path}/other"])


def test_a_run_that_ended_meanwhile_is_kept(data, tmp_path):
    """Two started at once: the other was quicker, and has even let go of the lock."""
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    def before():
        inner = run_folder.lock

        def lock(folder):
            run_folder.lock = inner
            finish([*argv, "--max_iters=2"])
            return inner(folder)
        run_folder.lock = lock

    line = refused(argv, before=before)

    assert f"another run has reached step 2 in {tmp_path}/out meanwhile" in line
    assert newest(tmp_path / "out")["step"] == 2


def test_out_dir_is_locked_from_before_its_checkpoint_is_read_to_the_last_step(data, tmp_path):
    """Otherwise two runs would resume from the same step, or a second one begin in the first's."""
    argv = [*SHORT, "--eval_interval=0", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    code = "import filelock, sys; filelock.FileLock(sys.argv[1]).acquire(timeout=0)"

    def tell(when):
        command = [sys.executable, "-c", code, tmp_path / "out/.lock"]
        done = subprocess.run(command, stderr=subprocess.DEVNULL)
        print(f"{when}: {'locked' if done.returncode else 'free'}")

    def before():
        inner = run_folder.open_resumed

        def open_resumed(s, data):
            tell("opening")
            return inner(s, data)
        run_folder.open_resumed = open_resumed
        on_step(lambda step: tell(f"step {step}"))

    os.mkdir(tmp_path / "out")
    new = finish([*argv, "--max_iters=2"], before=before)
    resumed = finish([*argv, "--max_iters=4", "--init_from=resume"], before=before)

    assert "opening: free\n" in new and "step 1: locked\n" in new
    assert "opening: locked\n" in resumed and "step 3: locked\n" in resumed


def test_a_disk_that_is_full_when_the_run_begins(data, tmp_path):
    """The message names the file that could not be written, and half a tokenizer goes."""
    def before():
        def copy(source, target):
            raise OSError(28, "No space left on device", source, None, target + "/tokenizer.json")
        run_folder.shutil.copy = copy

    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    assert "out/tokenizer.tmp/tokenizer.json: No space left on device" in line
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_a_byte_order_mark_in_front_of_what_was_written(tmp_path):
    """Some editors put it there when they save."""
    data = make_data(tmp_path / "data")
    argv = [*SHORT, f"--out_dir={tmp_path}/out", f"--data_dir={data}"]
    finish([*argv, "--max_iters=3"])
    for path in (f"{data}/meta.json", tmp_path / "out/config.py"):
        with open(path, "rb") as file:
            content = file.read()
        with open(path, "wb") as file:
            file.write(b"\xef\xbb\xbf" + content)

    settings = run_folder.read_settings(tmp_path / "out", max_iters=int)
    finish([str(tmp_path / "out/config.py"), "--init_from=resume", "--max_iters=6"])

    assert settings["max_iters"] == 3 and newest(tmp_path / "out")["step"] == 6
