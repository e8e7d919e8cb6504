"""Checkpoints: whole or not at all.

What is damaged, foreign or hostile is named and passed over or refused; a full disk is survived.
"""
import errno
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import zipfile

import pytest
import torch

from minillm import checkpoint, run_folder
from minillm.errors import UserError
from model import GPT
from support.damage import flip, truncate
from support.training_runs import TINY, Run, assert_same_run, die_at, finish, make_data, newest, numbers, on_step, refused

SHORT = [*TINY, "--max_iters=20", "--eval_interval=10"]            # checkpoints at 5, 10, 15, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("checkpoints") / "data")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """20 steps, never interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out"
    finish([*SHORT, f"--data_dir={data}", f"--out_dir={out}"])
    return out


@pytest.fixture(scope="module")
def died(data, tmp_path_factory):
    """The same run, killed at step 17: checkpoints of steps 10 and 15."""
    out = tmp_path_factory.mktemp("died") / "out"
    child = Run([*SHORT, f"--data_dir={data}", f"--out_dir={out}"], before=lambda: die_at(17))
    assert child.wait() == -9 and checkpoint.saved_steps(out) == [15, 10]
    return out


# ---- what is kept

def test_the_newest_few_and_the_best_are_kept(data, tmp_path):
    """best.pt holds the weights of the least validation loss, whatever came after.

    It holds no optimizer.
    """
    argv = [*TINY, "--eval_interval=5", "--min_lr=3", "--eval_iters=50", "--max_iters=40", f"--data_dir={data}"]   # a rate that rises, and ends badly
    finish([*argv, f"--out_dir={tmp_path}/out", "--keep_checkpoints=3"])
    names = {name for name in os.listdir(tmp_path / "out") if name.endswith(".pt")}
    assert names == {"ckpt_00000030.pt", "ckpt_00000035.pt", "ckpt_00000040.pt", "best.pt"}
    losses = {r["step"]: r["val_loss"] for r in numbers(tmp_path / "out") if "val_loss" in r and r["step"] > 0}
    best = checkpoint.load(tmp_path / "out/best.pt")
    assert best["step"] == min(losses, key=losses.get) < 40 and "optimizer" not in best
    finish([*argv, f"--out_dir={tmp_path}/all", "--keep_checkpoints=99"])
    same = checkpoint.load(checkpoint.step_path(tmp_path / "all", best["step"]))
    assert all(torch.equal(value, same["model"][name]) for name, value in best["model"].items())
    assert newest(tmp_path / "all")["best_val_loss"] == losses[best["step"]]


def test_the_folder_opens_on_its_own(straight, tmp_path):
    """Moved elsewhere, without data and tokenizer of old, it gives the model, and generates."""
    shutil.copytree(straight, tmp_path / "moved")
    model = GPT.from_checkpoint(str(tmp_path / "moved"), device="cpu", dtype="float32")
    weights = newest(straight)["model"]
    assert model.tokenizer.vocab_size == 300 and all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(list(model.generate([[0, 5]], 4, temperature=0))) >= 1


def test_no_save_best_and_checkpoints_only_at_the_end(data, tmp_path):
    finish([*SHORT, "--save_best=False", "--checkpoint_interval=0", f"--data_dir={data}", f"--out_dir={tmp_path}/out"])
    assert [name for name in os.listdir(tmp_path / "out") if name.endswith(".pt")] == ["ckpt_00000020.pt"]


# ---- how it is written

def test_written_beside_synced_then_renamed(tmp_path, monkeypatch):
    """The order of system calls that survives a power cut.

    Data synced, then the name, then the folder synced.
    """
    calls = []

    def record(name, describe):
        inner = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: (calls.append((name, *map(describe, args))), inner(*args))[1])
    record("fsync", lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    record("replace", os.path.basename)
    checkpoint.save(str(tmp_path / "ckpt_00000001.pt"), {"step": 1})
    assert calls == [("fsync", "ckpt_00000001.pt.tmp"), ("replace", "ckpt_00000001.pt.tmp", "ckpt_00000001.pt"), ("fsync", tmp_path.name)]
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
    assert torch.load(path) == {"step": 1} and os.listdir(tmp_path) == ["best.pt"]


# ---- damaged

DAMAGE = {
    "empty": lambda path: truncate(path, 0),
    "cut in half": lambda path: truncate(path, 0.5),
    "last byte gone": lambda path: os.truncate(path, os.path.getsize(path) - 1),
    "a bit flipped in the weights": lambda path: flip(path, 0.3),
    "a bit flipped in the optimizer": lambda path: flip(path, 0.8),
    "zeros": lambda path: open(path, "r+b").write(bytes(os.path.getsize(path))),
    "text": lambda path: open(path, "w").write("<html>404 Not Found</html>"),
    "another pickle": lambda path: torch.save([1, 2, 3], path),
    "weights alone": lambda path: torch.save({key: value for key, value in torch.load(path).items() if key != "optimizer"}, path),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_is_named_and_the_one_before_goes_on(data, straight, died, tmp_path, how):
    """The run says which file and why, sets it aside, goes on from step 10, and ends with the bits of a run never interrupted."""
    out = tmp_path / "out"
    shutil.copytree(died, out)
    DAMAGE[how](checkpoint.step_path(out, 15))
    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={out}", "--init_from=resume"])
    line = next(line for line in output.splitlines() if "ckpt_00000015.pt" in line)
    assert line.endswith("; going on from the checkpoint before it")
    assert any(word in line for word in ("damaged", "is not a checkpoint to resume from: no")), line
    assert "resuming at step 10" in output
    assert_same_run(straight, out)
    assert sorted(name for name in os.listdir(out) if "ckpt" in name) == ["ckpt_00000015.pt", "ckpt_00000015.pt.damaged", "ckpt_00000020.pt"]


def test_any_damage_is_found(died, tmp_path):
    """60 cuts and 200 flipped bits anywhere.

    Refused with one line, or the tensors are the same to the bit.
    """
    source, path, draw = checkpoint.step_path(died, 15), str(tmp_path / "file.pt"), random.Random(0)
    good, refused_flips = checkpoint.load(source), 0
    for _ in range(60):
        shutil.copy(source, path)
        os.truncate(path, draw.randrange(os.path.getsize(source)))
        with pytest.raises(UserError, match="damaged or cut short"):
            checkpoint.load(path)
    for _ in range(200):
        shutil.copy(source, path)
        flip(path, draw.random(), draw.randrange(8))
        try:
            state = checkpoint.load(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused_flips += 1
            continue
        assert state["step"] == 15 and all(torch.equal(value, good["model"][name]) for name, value in state["model"].items())
        assert all(torch.equal(value, good["optimizer"][i][name]) for i, moments in state["optimizer"].items() for name, value in moments.items())
    assert refused_flips > 120                   # the others hit the zip's padding and time stamps


def test_all_damaged(data, died, tmp_path):
    shutil.copytree(died, tmp_path / "out")
    for step in (10, 15):
        truncate(checkpoint.step_path(tmp_path / "out", step), 0.7)
    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--init_from=resume"])
    assert "every checkpoint in" in line and "--overwrite=True" in line
    assert checkpoint.saved_steps(tmp_path / "out") == [15, 10]            # nothing was removed
    finish([*SHORT, "--max_iters=2", f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--overwrite"])


def test_generation_falls_back_too(died, tmp_path, capsys):
    shutil.copytree(died, tmp_path / "out")
    truncate(checkpoint.step_path(tmp_path / "out", 15), 0.6)
    assert GPT.from_checkpoint(str(tmp_path / "out"), device="cpu").step == 10
    assert "ckpt_00000015.pt" in "".join(capsys.readouterr())


# ---- foreign

def test_start_weights_of_another_shape_or_tokenizer_are_refused(data, straight, tmp_path):
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    argv = [flag for flag in argv if not flag.startswith(("--n_", "--block"))] + ["--block_size=32"]
    assert "n_layer=2, these settings say 3" in refused([*argv, f"--init_from={straight}", "--n_layer=3"])
    other = make_data(tmp_path / "other")
    with open(f"{other}/meta.json") as file:
        meta = json.load(file)
    with open(f"{other}/tokenizer/tokenizer.json", "a") as file:
        file.write("\n")
    meta["tokenizer_hash"] = hashlib.sha256(open(f"{other}/tokenizer/tokenizer.json", "rb").read()).hexdigest()
    with open(f"{other}/meta.json", "w") as file:
        json.dump(meta, file)
    line = refused([*argv, f"--init_from={straight}", f"--data_dir={other}"])
    assert "trained with tokenizer" in line and meta["tokenizer_hash"][:12] in line
    assert not os.path.exists(tmp_path / "out")


@pytest.mark.parametrize("what", ["a tensor lacks", "a tensor of another shape", "moments of another shape", "an unknown key in model_config"])
def test_a_checkpoint_that_contradicts_itself_is_refused(data, died, tmp_path, what):
    shutil.copytree(died, tmp_path / "out")
    path = checkpoint.step_path(tmp_path / "out", 15)
    state = torch.load(path)
    if what == "a tensor lacks":
        del state["model"]["norm.weight"]
    elif what == "a tensor of another shape":
        state["model"]["norm.weight"] = torch.ones(7)
    elif what == "moments of another shape":
        state["optimizer"]["wte.weight"]["exp_avg"] = torch.zeros(2, 2)
    else:
        state["model_config"]["n_wings"] = 2
    torch.save(state, path)
    before = sorted(os.listdir(tmp_path / "out"))
    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--init_from=resume"])
    assert {"a tensor lacks": "norm.weight", "a tensor of another shape": "norm.weight", "moments of another shape": "exp_avg of wte.weight",
            "an unknown key in model_config": "n_wings"}[what] in line
    assert sorted(os.listdir(tmp_path / "out")) == before


# ---- hostile

class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def hostile_files(command, honest):
    """{name: bytes of a checkpoint that runs `command` where pickles are trusted}."""
    whole = io.BytesIO()
    torch.save(honest | {"extra": Payload(command)}, whole)
    alone = io.BytesIO()
    torch.save(Payload(command), alone)
    old = io.BytesIO()
    torch.save(honest | {"extra": Payload(command)}, old, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()                       # a zip with a pickle that torch didn't write
    with zipfile.ZipFile(archive, "w") as zip:
        zip.writestr("archive/data.pkl", pickle.dumps(Payload(command)))
        zip.writestr("archive/version", "3\n")
    return {"beside honest tensors": whole.getvalue(), "alone": alone.getvalue(), "old format": old.getvalue(),
            "plain pickle": pickle.dumps(Payload(command)), "hand-made zip": archive.getvalue()}


@pytest.mark.parametrize("name", hostile_files("true", {}))
def test_a_hostile_checkpoint_executes_nothing(data, died, tmp_path, name):
    """Resuming, starting from it and generating from it refuse it with one line.

    Its command never runs.
    """
    touched, out = tmp_path / "touched", tmp_path / "out"
    shutil.copytree(died, out)
    content = hostile_files(f"touch {touched}", torch.load(checkpoint.step_path(died, 15)))[name]
    for step in (10, 15):
        with open(checkpoint.step_path(out, step), "wb") as file:
            file.write(content)
    assert "every checkpoint in" in refused([*SHORT, f"--data_dir={data}", f"--out_dir={out}", "--init_from=resume"])
    refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/new", f"--init_from={out}"])
    with pytest.raises(UserError):
        GPT.from_checkpoint(str(out), device="cpu")
    assert not os.path.exists(touched)
    torch.load(io.BytesIO(hostile_files(f"touch {touched}", {})["alone"]), weights_only=False)
    assert os.path.exists(touched)               # the payload is a real one


def test_a_hostile_config_executes_nothing(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    with open(tmp_path / "out/config.py", "a") as file:
        file.write(f"seed = __import__('os').system('touch {tmp_path}/touched')\n")
    with pytest.raises(UserError, match="config.py"):
        run_folder.read_settings(tmp_path / "out")
    assert not os.path.exists(tmp_path / "touched")


# ---- the disk is full

def small_files_only(first, last, limit):
    """In the child: from step `first` up to `last`, no file may grow beyond `limit` bytes."""
    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def action(step):
            if step == first:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if step == last:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        on_step(action)
    return before


def test_a_save_that_finds_no_room_is_survived(data, straight, tmp_path):
    """Steps 7 to 12 cannot save: it says so, keeps the checkpoint before, goes on, saves the next.

    Every number is the same.
    """
    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--keep_checkpoints=9"], before=small_files_only(7, 12, 100_000))
    assert output.count("could not save") == 2 and "ckpt_00000010.pt: " in output and "best.pt: " in output
    assert "the checkpoints before it are untouched, training goes on" in output
    assert checkpoint.saved_steps(tmp_path / "out") == [20, 15, 5] and not [n for n in os.listdir(tmp_path / "out") if n.endswith(".tmp")]
    mine, theirs = newest(tmp_path / "out"), newest(straight)
    assert numbers(tmp_path / "out") == numbers(straight) and all(torch.equal(value, theirs["model"][name]) for name, value in mine["model"].items())


def test_no_room_for_the_last_one_is_an_error(data, straight, tmp_path):
    """The state at the end is lost: exit 2 and a line that says how to go on, which then works."""
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    line = refused(argv, before=small_files_only(17, 99, 100_000))
    assert "the state at step 20 could not be saved: make room, then --init_from=resume" in line
    finish([*argv, "--init_from=resume"])
    assert_same_run(straight, tmp_path / "out")


def test_a_log_that_finds_no_room_is_survived(data, straight, tmp_path):
    """metrics.jsonl may not grow for a while: its records wait, and all stand there in the end."""
    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=small_files_only(6, 9, 1))
    assert "its records wait in memory" in output
    assert numbers(tmp_path / "out") == numbers(straight)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB: room for what a run keeps, and one checkpoint more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(data, straight, small_disk):
    """Nothing more can be written from step 12 on: the run ends with exit 2.

    With room made it goes on exactly.
    """
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={small_disk}/out"]
    filler = small_disk / "filler"

    def fill():
        def action(step):
            if step == 12:
                handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
                try:
                    while True:
                        os.write(handle, bytes(4096))
                except OSError:
                    os.close(handle)
        on_step(action)
    line = refused(argv, before=fill)
    assert "the state at step 20 could not be saved: make room" in line and checkpoint.saved_steps(small_disk / "out")[0] == 10
    os.remove(filler)
    finish([*argv, "--init_from=resume"])
    assert_same_run(straight, small_disk / "out")
