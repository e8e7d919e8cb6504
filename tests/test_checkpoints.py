"""Checkpoints: whole or not at all; what is damaged or foreign is named, and skipped or refused."""
import errno
import os
import random
import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from minillm import checkpoint
from minillm.errors import UserError
from model import GPT
from support.damage import flip, truncate
from support.training_runs import (SHORT, TINY, assert_same_run, assert_same_weights, finish,
                                   make_data_of_another_tokenizer, newest, numbers, refused,
                                   run_until_killed)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """20 steps, never interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out"
    finish([*SHORT, f"--data_dir={data}", f"--out_dir={out}"])
    return out


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """The same run, killed at step 17: checkpoints of steps 10 and 15."""
    out = tmp_path_factory.mktemp("killed") / "out"
    run_until_killed([*SHORT, f"--data_dir={data}", f"--out_dir={out}"], step=17)
    assert checkpoint.saved_steps(out) == [15, 10]
    return out


def checkpoints_in(folder):
    return sorted(name for name in os.listdir(folder) if ".pt" in name)


# ---- what is kept

def test_the_newest_few_and_the_best_are_kept(data, tmp_path):
    """best.pt holds the weights of the least validation loss, and no optimizer."""
    # a rate that rises, and ends badly
    argv = [*TINY, "--eval_interval=5", "--min_lr=3", "--eval_iters=50", "--max_iters=40",
            f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/out", "--keep_checkpoints=3"])
    finish([*argv, f"--out_dir={tmp_path}/all", "--keep_checkpoints=99"])

    assert checkpoints_in(tmp_path / "out") == [
        "best.pt", "ckpt_00000030.pt", "ckpt_00000035.pt", "ckpt_00000040.pt"]
    losses = {record["step"]: record["val_loss"] for record in numbers(tmp_path / "out")
              if "val_loss" in record and record["step"] > 0}
    best = checkpoint.load(tmp_path / "out/best.pt")
    assert best["step"] == min(losses, key=losses.get) < 40
    assert "optimizer" not in best
    same_step = checkpoint.load(checkpoint.step_path(tmp_path / "all", best["step"]))
    assert_same_weights(best["model"], same_step["model"])
    assert newest(tmp_path / "all")["best_val_loss"] == losses[best["step"]]


def test_the_folder_opens_on_its_own(straight, tmp_path):
    """Moved elsewhere, without data and their tokenizer, it gives the model, which generates."""
    shutil.copytree(straight, tmp_path / "moved")

    model = GPT.from_checkpoint(str(tmp_path / "moved"), device="cpu", dtype="float32")

    assert model.tokenizer.vocab_size == 300
    assert_same_weights(model.state_dict(), newest(straight)["model"])
    assert len(list(model.generate([[0, 5]], 4, temperature=0))) >= 1


def test_no_save_best_and_checkpoints_only_at_the_end(data, tmp_path):
    finish([*SHORT, "--save_best=False", "--checkpoint_interval=0", f"--data_dir={data}",
            f"--out_dir={tmp_path}/out"])

    assert checkpoints_in(tmp_path / "out") == ["ckpt_00000020.pt"]


# ---- how it is written

def record_calls(monkeypatch, calls, name, describe):
    """Append (name, `describe` of each argument) to `calls` for each call of os.<name>."""
    inner = getattr(os, name)

    def recorded(*args):
        calls.append((name, *map(describe, args)))
        return inner(*args)
    monkeypatch.setattr(os, name, recorded)


def test_written_beside_synced_then_renamed(tmp_path, monkeypatch):
    """The order of system calls that survives a power cut: sync the data, rename, sync the folder.
    """
    def name_of(handle):
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
    calls = []
    record_calls(monkeypatch, calls, "fsync", name_of)
    record_calls(monkeypatch, calls, "replace", os.path.basename)

    checkpoint.save(str(tmp_path / "ckpt_00000001.pt"), {"step": 1})

    assert calls == [("fsync", "ckpt_00000001.pt.tmp"),
                     ("replace", "ckpt_00000001.pt.tmp", "ckpt_00000001.pt"),
                     ("fsync", tmp_path.name)]
    assert os.listdir(tmp_path) == ["ckpt_00000001.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_one(tmp_path, monkeypatch, call):
    path = str(tmp_path / "best.pt")
    checkpoint.save(path, {"step": 1})

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError):
        checkpoint.save(path, {"step": 2})

    assert torch.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["best.pt"]


# ---- damaged

def overwrite_with_zeros(path):
    with open(path, "r+b") as file:
        file.write(bytes(os.path.getsize(path)))


def overwrite_with_text(path):
    with open(path, "w") as file:
        file.write("<html>404 Not Found</html>")


def drop_the_optimizer(path):
    state = torch.load(path)
    del state["optimizer"]
    torch.save(state, path)


class Damage(NamedTuple):
    name: str
    do: Callable                           # to the file of this path
    says: str


CUT, CHECKSUM = "it is damaged or cut short", "is damaged: the checksum of"
NOT_ONE = "is not a checkpoint to resume from: no"
DAMAGE = [
    Damage("empty", lambda path: truncate(path, 0), CUT),
    Damage("cut in half", lambda path: truncate(path, 0.5), CUT),
    Damage("last byte gone", lambda path: os.truncate(path, os.path.getsize(path) - 1), CUT),
    Damage("a bit flipped in the weights", lambda path: flip(path, 0.3), CHECKSUM),
    Damage("a bit flipped in the optimizer", lambda path: flip(path, 0.8), CHECKSUM),
    Damage("zeros", overwrite_with_zeros, CUT),
    Damage("text", overwrite_with_text, CUT),
    Damage("another pickle", lambda path: torch.save([1, 2, 3], path), NOT_ONE),
    Damage("weights alone", drop_the_optimizer, NOT_ONE + " optimizer"),
]


@pytest.mark.parametrize("case", DAMAGE, ids=lambda case: case.name)
def test_a_damaged_newest_is_named_and_set_aside(data, straight, killed, tmp_path, case):
    """The run resumes at the checkpoint before it, and ends with the bits of the straight run."""
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    case.do(checkpoint.step_path(out, 15))

    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={out}", "--init_from=resume"])

    line = next(line for line in output.splitlines() if "ckpt_00000015.pt" in line)
    assert case.says in line
    assert line.endswith("; using the checkpoint before it")
    assert "resuming at step 10" in output
    assert_same_run(straight, out)
    assert checkpoints_in(out) == ["best.pt", "ckpt_00000015.pt", "ckpt_00000015.pt.damaged",
                                   "ckpt_00000020.pt"]


def test_any_cut_is_found(killed, tmp_path):
    source, path, draw = checkpoint.step_path(killed, 15), tmp_path / "file.pt", random.Random(0)

    for _ in range(60):
        shutil.copy(source, path)
        os.truncate(path, draw.randrange(os.path.getsize(source)))
        with pytest.raises(UserError, match="damaged or cut short"):
            checkpoint.load(path)


def test_any_flipped_bit_is_found(killed, tmp_path):
    """Each of 200 is refused with one line, or leaves the tensors the same to the bit."""
    source, path, draw = checkpoint.step_path(killed, 15), tmp_path / "file.pt", random.Random(0)
    good, refused_flips = checkpoint.load(source), 0

    for _ in range(200):
        shutil.copy(source, path)
        flip(path, draw.random(), draw.randrange(8))
        try:
            state = checkpoint.load(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused_flips += 1
            continue
        assert state["step"] == 15
        assert_same_weights(state["model"], good["model"])
        for name, moments in state["optimizer"].items():
            assert_same_weights(moments, good["optimizer"][name])

    assert refused_flips > 120                   # the others hit the zip's padding and time stamps


def test_all_damaged(data, killed, tmp_path):
    """Nothing is removed; --overwrite=True starts over."""
    shutil.copytree(killed, tmp_path / "out")
    for step in (10, 15):
        truncate(checkpoint.step_path(tmp_path / "out", step), 0.7)
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    line = refused([*argv, "--init_from=resume"])

    assert "every checkpoint in" in line and "--overwrite=True" in line
    assert checkpoint.saved_steps(tmp_path / "out") == [15, 10]
    finish([*argv, "--max_iters=2", "--overwrite"])


@pytest.mark.parametrize("left", [[], ["hf"], ["hf", "gguf", "loss.png"]])
def test_a_new_run_names_what_was_made_of_the_old_one(data, killed, tmp_path, left):
    """An export of the old model lies beside the new one: it is named, and stays."""
    shutil.copytree(killed, tmp_path / "out")
    for name in left:
        (tmp_path / "out" / name).mkdir()
    argv = [*SHORT, "--max_iters=16", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    resumed = finish([*argv, "--init_from=resume"])
    begun_anew = finish([*argv, "--max_iters=2", "--overwrite"])

    assert "still holds" not in resumed
    said = [line for line in begun_anew.splitlines() if "still holds" in line]
    line = f"{tmp_path}/out still holds {', '.join(left)} of the model before this one"
    assert said == ([line] if left else [])
    assert all((tmp_path / "out" / name).exists() for name in left)


def test_generation_passes_a_damaged_one_over_too(killed, tmp_path, capsys):
    shutil.copytree(killed, tmp_path / "out")
    truncate(checkpoint.step_path(tmp_path / "out", 15), 0.6)

    assert GPT.from_checkpoint(str(tmp_path / "out"), device="cpu").step == 10
    assert "ckpt_00000015.pt" in "".join(capsys.readouterr())


# ---- foreign

SHAPELESS = [flag for flag in SHORT if not flag.startswith("--n_")]


def test_start_weights_of_another_shape_are_refused(data, straight, tmp_path):
    line = refused([*SHAPELESS, f"--init_from={straight}", "--n_layer=3", f"--data_dir={data}",
                    f"--out_dir={tmp_path}/out"])

    assert "n_layer=2, these settings say 3" in line
    assert not os.path.exists(tmp_path / "out")


def test_start_weights_of_another_tokenizer_are_refused(straight, tmp_path):
    other = make_data_of_another_tokenizer(tmp_path / "other")

    line = refused([*SHAPELESS, f"--init_from={straight}", f"--data_dir={other}",
                    f"--out_dir={tmp_path}/out"])

    assert f"{other} was prepared with another tokenizer than {straight}/ckpt_" in line
    assert line.endswith(f"prepare the data with --tokenizer={straight}/tokenizer")
    assert not os.path.exists(tmp_path / "out")


def take_a_tensor_away(state):
    del state["model"]["norm.weight"]


def change_the_shape_of_a_tensor(state):
    state["model"]["norm.weight"] = torch.ones(7)


def change_the_shape_of_a_moment(state):
    state["optimizer"]["wte.weight"]["exp_avg"] = torch.zeros(2, 2)


def add_a_key_to_model_config(state):
    state["model_config"]["n_wings"] = 2


CONTRADICTIONS = {
    take_a_tensor_away: "norm.weight is missing",
    change_the_shape_of_a_tensor: "norm.weight is torch.float32 of shape (7,)",
    change_the_shape_of_a_moment: "exp_avg of wte.weight",
    add_a_key_to_model_config: "unknown key 'n_wings'",
}


@pytest.mark.parametrize("change", CONTRADICTIONS, ids=lambda change: change.__name__)
def test_a_checkpoint_that_contradicts_itself_is_refused(data, killed, tmp_path, change):
    shutil.copytree(killed, tmp_path / "out")
    path = checkpoint.step_path(tmp_path / "out", 15)
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    before = sorted(os.listdir(tmp_path / "out"))

    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out",
                    "--init_from=resume"])

    assert CONTRADICTIONS[change] in line
    assert sorted(os.listdir(tmp_path / "out")) == before
