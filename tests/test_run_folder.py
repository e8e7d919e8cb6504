"""out_dir tells the truth about its run: config.py, tokenizer, rolling back, totals."""
import json
import os
import re
import shutil

import pytest
import torch

import train
from minillm import checkpoint, run_folder
from minillm.errors import UserError
from model import GPT
from support.training_runs import (TINY, Run, assert_same_run, die_at, finish, make_data, newest,
                                   numbers, on_step, refused)

SHORT = [*TINY, "--max_iters=10", "--eval_interval=0", "--log_interval=1"]
SHAPELESS = ["--block_size=32", "--batch_size=2", "--eval_interval=0", "--log_interval=1",
             "--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A finished run of 10 steps, with checkpoints of steps 5 and 10."""
    out = tmp_path_factory.mktemp("base") / "out"
    finish([*SHORT, f"--data_dir={data}", f"--out_dir={out}"])
    return out


def records(folder):
    with open(folder / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


# ---- config.py

def test_config_states_the_shape_of_weights_it_started_from(data, base, tmp_path):
    argv = [*SHAPELESS, "--max_iters=4", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    finish([*argv, f"--init_from={base}"])

    settings = run_folder.read_settings(tmp_path / "out")
    assert (settings["n_layer"], settings["n_embd"], settings["n_kv_head"]) == (2, 32, 1)
    assert settings["init_from"] == str(base)
    config = f"{tmp_path}/out/config.py"
    assert "done at step 6" in finish([config, "--init_from=resume", "--max_iters=6"])
    assert "done at step 6" in finish([config, f"--out_dir={tmp_path}/again"])


def test_config_keeps_the_shape_after_a_resume_that_does_not_repeat_it(data, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    argv = [*SHAPELESS, "--gradient_accumulation_steps=2", f"--data_dir={data}"]

    output = finish([*argv, f"--out_dir={tmp_path}/out", "--init_from=resume", "--max_iters=11"])

    assert "max_iters 10 → 11" in output and "n_embd" not in output
    assert run_folder.read_settings(tmp_path / "out")["n_embd"] == 32


def test_more_epochs_than_before_are_more_steps(data, tmp_path):
    """max_iters=0 stays 0 in config.py; what came of the epochs is a comment."""
    argv = [*SHORT, "--max_iters=0", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    assert "done at step 4" in finish([*argv, "--epochs=0.1"])

    assert run_folder.read_settings(tmp_path / "out")["max_iters"] == 0
    assert "# steps: 4\n" in (tmp_path / "out/config.py").read_text()
    config = f"{tmp_path}/out/config.py"
    assert "done at step 7" in finish([config, "--init_from=resume", "--epochs=0.2"])


def test_what_one_command_allows_is_not_allowed_for_ever(data, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    other = make_data(tmp_path / "other", train=5000)
    third = make_data(tmp_path / "third", train=6000)
    argv = [*SHORT, f"--out_dir={tmp_path}/out", "--init_from=resume"]
    finish([*argv, f"--data_dir={other}", "--allow_other_data", "--max_iters=12"])

    config = f"{tmp_path}/out/config.py"
    line = refused([config, "--init_from=resume", f"--data_dir={third}"])

    assert f"was trained on, which was {other}: give --data_dir={other}" in line


# ---- an old run stays until the new one has made a step

def fails_in_the_first_step():
    def action(step):
        raise UserError("no compiler")
    on_step(action)


def test_a_run_that_cannot_start_leaves_the_old_one(data, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    kept = {name: (tmp_path / "out" / name).read_bytes()
            for name in ("config.py", "metrics.jsonl", "ckpt_00000005.pt", "ckpt_00000010.pt")}
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--overwrite", "--seed=7"]

    refused(argv, before=fails_in_the_first_step)

    assert all((tmp_path / "out" / name).read_bytes() == old for name, old in kept.items())
    finish([*argv, "--max_iters=3"])
    assert checkpoint.saved_steps(tmp_path / "out") == [3]
    assert records(tmp_path / "out")[0]["step"] == 0 and records(tmp_path / "out")[-1]["step"] == 3


def test_no_compiler_is_one_line(data, base, tmp_path):
    def before():
        def missing(*args, **kwargs):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ...")
        train.compile_for_training = lambda model, device: missing

    line = refused([*SHORT, "--compile", f"--data_dir={data}", f"--out_dir={tmp_path}/out"],
                   before=before)

    assert line.endswith("compile=True needs a C++ compiler: install g++, or leave compile out")


# ---- the tokenizer

def moved(data, folder):
    """The data in folder/pretrain, the tokenizer in folder/tokenizer; meta.json names neither."""
    shutil.copytree(data, folder / "pretrain")
    shutil.move(folder / "pretrain/tokenizer", folder / "tokenizer")
    meta = json.loads((folder / "pretrain/meta.json").read_text())
    (folder / "pretrain/meta.json").write_text(json.dumps(meta | {"tokenizer": "data/of/old"}))


@pytest.mark.parametrize("where", ["beside", "named", "init_from", "out_dir"])
def test_the_tokenizer_is_found(data, base, tmp_path, where):
    moved(data, tmp_path)
    argv = [*SHAPELESS, "--max_iters=11", f"--data_dir={tmp_path}/pretrain",
            "--gradient_accumulation_steps=2", f"--out_dir={tmp_path}/out"]
    extra = {"beside": [], "named": [f"--tokenizer={tmp_path}/elsewhere"],
             "init_from": [f"--init_from={base}"], "out_dir": ["--init_from=resume"]}[where]
    if where != "beside":
        shutil.move(tmp_path / "tokenizer", tmp_path / "elsewhere")
    if where == "out_dir":
        shutil.copytree(base, tmp_path / "out")

    assert "--- window" in finish([*argv, *extra, "--inspect_step=1"])
    finish([*argv, *extra])

    assert os.path.exists(tmp_path / "out/tokenizer/tokenizer.json")


def test_where_it_was_looked_for_is_said(data, tmp_path):
    moved(data, tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")

    line = refused([*SHORT, f"--data_dir={tmp_path}/pretrain", f"--out_dir={tmp_path}/out"])

    assert "data/of/old, " in line and f"{tmp_path}/tokenizer, " in line
    assert "--tokenizer=DIR" in line


# ---- totals and the last validation

def test_totals_are_of_the_whole_run(data, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    first = records(base)[-1]

    finish([*SHORT, "--max_iters=15", f"--data_dir={data}", f"--out_dir={tmp_path}/out",
            "--init_from=resume"])

    last = records(tmp_path / "out")[-1]
    assert first["tokens"] == 10 * 4 * 32 and last["tokens"] == 15 * 4 * 32
    assert last["seconds"] > first["seconds"]
    assert [r["tokens"] for r in numbers(tmp_path / "out")] == [128 * (i + 1) for i in range(15)]
    assert records(tmp_path / "out")[0]["active_parameters"] == last["active_parameters"]


def test_a_longer_run_keeps_the_validation_at_its_old_end(data, tmp_path):
    argv = [*SHORT, "--eval_interval=4", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--max_iters=6"])
    finish([*argv, "--max_iters=6", "--init_from=resume"])

    finish([*argv, "--max_iters=10", "--init_from=resume"])

    steps = [r["step"] for r in records(tmp_path / "out") if "val_loss" in r]
    assert steps == [0, 4, 6, 8, 10]


def test_a_record_without_a_whole_step_is_dropped(data, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    before = numbers(tmp_path / "out")
    with open(tmp_path / "out/metrics.jsonl", "a") as file:
        file.write('{"step": null}\n{"step": "3"}\n{"step": 1.5}\n{"step": true}\n[]\nnull\n')

    finish([*SHORT, "--max_iters=11", f"--data_dir={data}", f"--out_dir={tmp_path}/out",
            "--init_from=resume"])

    assert numbers(tmp_path / "out")[:10] == before


# ---- which checkpoint

def test_rolling_back_repeats_the_run(data, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")

    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--init_from=resume"]

    finish([*argv, "--checkpoint=5", "--max_iters=5", "--eval_interval=0"])
    assert checkpoint.saved_steps(tmp_path / "out") == [5]      # also where nothing is trained
    output = finish(argv)

    assert "resuming at step 5" in output
    assert_same_run(base, tmp_path / "out")
    assert os.path.exists(tmp_path / "out/ckpt_00000010.pt.rolled_back")
    assert "checkpoint" not in run_folder.read_settings(tmp_path / "out")


def test_a_best_of_the_future_is_set_aside(data, tmp_path):
    argv = [*SHORT, "--eval_interval=5", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish(argv)
    assert checkpoint.best_step(tmp_path / "out") == 10

    finish([*argv, "--init_from=resume", "--checkpoint=5", "--max_iters=6"])

    assert os.path.exists(tmp_path / "out/best.pt.rolled_back")
    assert checkpoint.best_step(tmp_path / "out") in (5, 6)


@pytest.mark.parametrize("which, step", [("best", 5), ("5", 5), ("newest", 10)])
def test_starting_from_a_chosen_checkpoint(data, base, tmp_path, which, step):
    source = tmp_path / "source"
    shutil.copytree(base, source)
    shutil.copy(source / "ckpt_00000005.pt", source / "best.pt")
    argv = [*SHAPELESS, "--max_iters=1", f"--data_dir={data}", "--learning_rate=0", "--min_lr=0",
            "--weight_decay=0"]

    finish([*argv, f"--init_from={source}", f"--checkpoint={which}", f"--out_dir={tmp_path}/a"])

    weights = checkpoint.load(checkpoint.step_path(base, step))["model"]
    new = newest(tmp_path / "a")["model"]
    assert all(torch.equal(value, new[name]) for name, value in weights.items())
    assert GPT.from_checkpoint(str(source), device="cpu", which=which).step == step
    # its config.py names the very file
    finish([f"{tmp_path}/a/config.py", f"--out_dir={tmp_path}/b"])
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("flags, says", [
    (["--init_from=resume", "--checkpoint=7"], "no checkpoint of step 7 in .*; there are 10, 5"),
    (["--init_from=resume", "--checkpoint=best"], "best holds weights alone"),
    (["--init_from=resume", "--checkpoint=last"], "must be newest, best or the number of a step"),
    (["--checkpoint=5"], "needs --init_from=DIR"),
])
def test_a_choice_that_means_nothing(data, base, tmp_path, flags, says):
    shutil.copytree(base, tmp_path / "out")

    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", *flags])

    assert re.search(says, line)


def test_best_alone_is_taken(base, tmp_path):
    shutil.copytree(base / "tokenizer", tmp_path / "share/tokenizer")
    shutil.copy(base / "ckpt_00000005.pt", tmp_path / "share/best.pt")

    assert GPT.from_checkpoint(str(tmp_path / "share"), device="cpu").step == 5


def test_what_is_kept(data, tmp_path):
    """keep_every keeps for good; a resume that names neither lowers neither."""
    argv = [*SHORT, "--checkpoint_interval=1", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--keep_checkpoints=3", "--keep_every=4"])
    assert checkpoint.saved_steps(tmp_path / "out") == [10, 9, 8, 4]

    finish([*argv, "--init_from=resume", "--max_iters=14"])

    assert checkpoint.saved_steps(tmp_path / "out") == [14, 13, 12, 8, 4]


# ---- two at once, and folders that cannot be read

def test_a_second_run_in_the_same_folder_is_refused(data, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    held = run_folder.lock(str(tmp_path / "out"))

    line = refused([*SHORT, "--init_from=resume", "--max_iters=12", f"--data_dir={data}",
                    f"--out_dir={tmp_path}/out"])
    held.release()

    assert "another run is at work in" in line


def test_a_file_without_permission_is_not_called_damaged(data, base, tmp_path, monkeypatch):
    """It ends the resume: an older checkpoint in its place would be a surprise."""
    shutil.copytree(base, tmp_path / "out")

    def before():
        inner = checkpoint.zipfile.ZipFile

        def forbidden(path, *args, **kwargs):
            if "ckpt_00000010" in str(path):
                raise PermissionError(13, "Permission denied")
            return inner(path, *args, **kwargs)
        checkpoint.zipfile.ZipFile = forbidden

    line = refused([*SHORT, "--init_from=resume", f"--data_dir={data}",
                    f"--out_dir={tmp_path}/out"], before=before)

    assert "ckpt_00000010.pt: Permission denied" in line and "damaged" not in line
    assert checkpoint.saved_steps(tmp_path / "out") == [10, 5]


def test_a_resumed_run_that_was_killed_at_once_resumes(data, base, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    argv = [*SHORT, "--max_iters=14", f"--data_dir={data}", f"--out_dir={tmp_path}/out",
            "--init_from=resume"]
    child = Run(argv, before=lambda: die_at(10))
    assert child.wait() == -9

    finish(argv)

    assert [r["step"] for r in numbers(tmp_path / "out")] == list(range(14))


def test_a_tokenizer_that_the_data_are_not_made_of_is_refused(data, tmp_path):
    """The right one would be found beside the data, and the flag would change nothing."""
    other = shutil.copytree(os.path.join(data, "tokenizer"), tmp_path / "other")
    with open(other / "tokenizer.json", "a") as file:
        file.write("\n")

    message = refused([*SHORT, f"--data_dir={data}", f"--tokenizer={other}",
                       f"--out_dir={tmp_path}/out"])

    assert f"--tokenizer={other} is not the one that {data} was prepared with" in message
