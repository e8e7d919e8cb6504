"""A full disk: training continues where it can; it and export.py end with exit 2 otherwise."""
import os
import resource
import signal
import subprocess

import pytest

from minillm import checkpoint
from support import processes
from support.tiny_models import tiny_model, write_folder
from support.training_runs import (SHORT, assert_same_run, assert_same_weights, finish, newest,
                                   numbers, on_step, refused)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """20 steps with room for everything."""
    out = tmp_path_factory.mktemp("straight") / "out"
    finish([*SHORT, f"--data_dir={data}", f"--out_dir={out}"])
    return out


def small_files_only(first, last, limit):
    """In the child: from step `first` to step `last`, no file may grow beyond `limit` bytes."""
    def allow(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def action(step):
        if step == first:
            allow(limit)
        if step == last:
            allow(resource.RLIM_INFINITY)

    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        on_step(action)
    return before


def test_a_save_that_finds_no_room_is_survived(data, straight, tmp_path):
    """Steps 7 to 12 cannot save: the run says so, keeps the checkpoint before, saves the next.

    All numbers are those of a run with room.
    """
    out = tmp_path / "out"

    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={out}", "--keep_checkpoints=9"],
                    before=small_files_only(7, 12, 100_000))

    assert output.count("could not save") == 2
    assert "ckpt_00000010.pt: " in output and "best.pt: " in output
    assert "the checkpoints before it are untouched, training continues" in output
    assert checkpoint.saved_steps(out) == [20, 15, 5]
    # the better weights of step 10 are lost: only step 0 was better than those to come
    saved = checkpoint.load(checkpoint.step_path(out, 15))
    assert saved["best_val_loss"] == numbers(out)[0]["val_loss"]
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    assert numbers(out) == numbers(straight)
    assert_same_weights(newest(out)["model"], newest(straight)["model"])


def test_no_room_for_the_last_one_is_an_error(data, straight, tmp_path):
    """Exit 2, and a line that says how to go on, which then works."""
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    line = refused(argv, before=small_files_only(17, 99, 100_000))

    assert "the state at step 20 could not be saved: make room, then give" in line
    assert "--init_from=resume" in line
    finish([*argv, "--init_from=resume"])
    assert_same_run(straight, tmp_path / "out")


def test_no_room_for_any_of_them(data, straight, tmp_path):
    """Nothing can be resumed then: the line says that the same command starts over, and it does."""
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    line = refused(argv, before=small_files_only(1, 99, 100_000))

    assert "or the same command if none was saved before" in line
    assert checkpoint.saved_steps(tmp_path / "out") == []
    finish(argv)
    assert_same_run(straight, tmp_path / "out")


def test_a_log_that_finds_no_room_is_survived(data, straight, tmp_path):
    """metrics.jsonl may not grow for a while: its records wait, and are all there in the end."""
    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"],
                    before=small_files_only(6, 9, 1))

    assert "its records wait in memory" in output
    assert numbers(tmp_path / "out") == numbers(straight)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB: room for what a run keeps, and one checkpoint more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path):
    """Write to `path` until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_disk_that_is_really_full(data, straight, small_disk):
    """Full from step 12 on: the run ends with exit 2. With room made it resumes exactly."""
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={small_disk}/out"]
    filler = small_disk / "filler"

    def action(step):
        if step == 12:
            fill(filler)
    line = refused(argv, before=lambda: on_step(action))

    assert "the state at step 20 could not be saved: make room" in line
    assert checkpoint.saved_steps(small_disk / "out")[0] == 10
    os.remove(filler)
    finish([*argv, "--init_from=resume"])
    assert_same_run(straight, small_disk / "out")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("export") / "model", tiny_model(n_expert=4))


def assert_one_line(model, folder, format, says, **options):
    """export.py into `folder` is refused with a line, and leaves nothing."""
    pytest.importorskip("gguf")
    pytest.importorskip("safetensors")
    argv = [f"--out_dir={model}", f"--export_dir={folder}/export", f"--format={format}"]

    line = processes.refused("export", argv, **options)

    assert f"export.py: cannot write {folder}/export: " in line and says in line
    assert not [name for name in os.listdir(folder) if "export" in name]


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("room", [0, 20_000, 80_000, 120_000])
def test_an_export_that_finds_no_room_is_one_line(model, small_disk, format, room):
    """Wherever in the files the disk is full."""
    fill(small_disk / "filler")
    with open(small_disk / "filler", "rb+") as file:
        file.truncate(os.path.getsize(small_disk / "filler") - room)

    assert_one_line(model, small_disk, format, "No space left on device")


@pytest.mark.parametrize("format, says", [
    ("hf", "File too large"), ("gguf", "a limit on the size of a file")])
def test_an_export_that_meets_a_limit_is_one_line(model, tmp_path, format, says):
    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    assert_one_line(model, tmp_path, format, says, before=before)
