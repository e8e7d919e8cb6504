"""Whatever stops preparation, at whatever moment.

The old files are whole, or the new ones are, and the next run cleans up.
"""
import errno
import os
import mmap
import random
import resource
import shutil
import signal
import sys

import pytest

from minillm import atomic_folder as output_folder
from support.preparation_runs import chats, fingerprint, finish, refused, texts, write_chats, write_texts
from support.processes import Fork
from support.tiny_tokenizer import make_tokenizer

STAGES = ["prepare_pretrain", "prepare_sft", "train_tokenizer"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_tokenizer(folder / "tokenizer")
    for name, count in (("old", 150), ("new", 400)):
        write_texts(folder / f"{name}.jsonl", texts(count))
        write_chats(folder / f"{name}.json", chats(count))
    return folder


def argv(corpus, stage, which, out):
    if stage == "train_tokenizer":
        return [corpus / f"{which}.jsonl", "--vocab_size=300", f"--out_dir={out}"]
    return [corpus / f"{which}.{'json' if stage == 'prepare_sft' else 'jsonl'}", f"--tokenizer={corpus}/tokenizer", f"--out_dir={out}",
            "--val_fraction=0.1", "--batch_size=2000"]


@pytest.fixture(scope="module", params=STAGES)
def case(request, corpus, tmp_path_factory):
    """(stage, the old run's arguments, the new run's, the folder, what old and new files look like), the old run done."""
    stage = request.param
    reference = tmp_path_factory.mktemp(stage)
    prints = {}
    for which in ("old", "new"):
        finish(stage, *argv(corpus, stage, which, reference / "out"))
        prints[which] = fingerprint(reference / "out")
    assert prints["old"] != prints["new"] and len(prints["old"]) > 1
    return stage, lambda out: argv(corpus, stage, "old", out), lambda out: argv(corpus, stage, "new", out), prints["old"], prints["new"]


class Clock:
    """Counts a child's calls and returns of functions: a time that no other process can stretch."""

    def __init__(self):
        self.ticks = memoryview(mmap.mmap(-1, 8)).cast("Q")     # shared with the child

    def start(self, last=None):
        """In the child: count; SIGKILL at tick `last`."""
        ticks = self.ticks
        ticks[0] = 0

        def tick(frame, event, argument):
            ticks[0] += 1
            if ticks[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(tick)


def battery(case, tmp_path, kills, seed):
    """Kill a run that replaces old files, and one that writes the first ones, at random moments."""
    stage, old_argv, new_argv, old, new = case
    out, rng = tmp_path / "out", random.Random(seed)
    # the reference's meta.json and this one's name the same sources and tokenizer, so files compare
    # byte for byte
    finish(stage, *old_argv(out))
    assert fingerprint(out) == old
    clock = Clock()
    finish(stage, *new_argv(tmp_path / "other"), before=clock.start)
    duration = clock.ticks[0]
    left = {"old": 0, "new": 0, "nothing": 0, "ended": 0}
    for number in range(kills):
        first = number % 4 == 3
        shutil.rmtree(out, ignore_errors=True)
        if not first:
            shutil.copytree(tmp_path / "old", out) if (tmp_path / "old").exists() else finish(stage, *old_argv(out))
            if not (tmp_path / "old").exists():
                shutil.copytree(out, tmp_path / "old")
        moment = rng.randrange(1, duration * 21 // 20)
        child = Fork(stage, new_argv(out), before=lambda: clock.start(moment))
        left["ended"] += child.wait() == 0
        found = fingerprint(out)
        assert found in ([{}, new] if first else [old, new]), f"kill {number}"
        left["old" if found == old else "new" if found else "nothing"] += 1
        if number % 5 == 0 or kills < 10:
            finish(stage, *new_argv(out))
            assert fingerprint(out) == new
            # nothing left behind
            assert sorted(os.listdir(tmp_path)) == ["old", "other", "out"]
    finish(stage, *new_argv(out))
    assert sorted(os.listdir(tmp_path)) == ["old", "other", "out"]
    return left


def test_killed_at_random_moments(case, tmp_path):
    battery(case, tmp_path, 6, 0)


@pytest.mark.slow
def test_killed_at_many_random_moments(case, tmp_path):
    left = battery(case, tmp_path, 100, 1)
    print(case[0], left)
    assert left["old"] > 10 and left["nothing"] > 3 and left["ended"] < 50


def die_in(module, name, when):
    """Make `module.name` a place where the process is killed, `when` "before" or "after" it did its work."""
    inner = getattr(module, name)

    def deadly(*args, **kwargs):
        if when == "after":
            inner(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, deadly)


# where the run dies, and whether the folder is then still the old one
STEPS = [
    (output_folder.os, "mkdir", "after", "old"), (output_folder, "sync", "before", "old"), (output_folder, "sync", "after", "old"),
    (output_folder, "_take_place", "before", "old"), (output_folder, "_exchange", "before", "old"), (output_folder, "_exchange", "after", "new"),
    (output_folder, "_take_place", "after", "new"),
]


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_killed_at_every_step(case, tmp_path, step):
    stage, old_argv, new_argv, old, new = case
    module, name, when, expected = STEPS[step]
    out = tmp_path / "out"
    finish(stage, *old_argv(out))
    child = Fork(stage, new_argv(out), before=lambda: die_in(module, name, when))
    assert child.wait() == -signal.SIGKILL, child.output
    assert fingerprint(out) == {"old": old, "new": new}[expected]
    assert sorted(os.listdir(tmp_path)) == [".out.lock", ".out.partial", "out"]
    finish(stage, *new_argv(out))
    assert fingerprint(out) == new and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_where_folders_cannot_be_exchanged(case, tmp_path, when):
    """On a file system without an atomic exchange the old folder may be aside for a moment.

    The next run, even one that fails, brings it back.
    """
    stage, old_argv, new_argv, old, new = case
    out = tmp_path / "out"
    finish(stage, *old_argv(out))

    def fault():
        output_folder._exchange = lambda a, b: False
        inner, seen = os.rename, []

        def rename(a, b):
            seen.append(a)
            if len(seen) == 2:
                if when == "after":
                    inner(a, b)
                os.kill(os.getpid(), signal.SIGKILL)
            inner(a, b)
        output_folder.os.rename = rename
    child = Fork(stage, new_argv(out), before=fault)
    assert child.wait() == -signal.SIGKILL
    assert fingerprint(out) == (new if when == "after" else {})
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(stage, empty, *[flag for flag in old_argv(out) if str(flag).startswith("--")])
    assert fingerprint(out) == (new if when == "after" else old)
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "out"]

    def no_exchange():
        output_folder._exchange = lambda a, b: False
    finish(stage, *new_argv(out), before=no_exchange)
    assert fingerprint(out) == new and sorted(os.listdir(tmp_path)) == ["empty.jsonl", "out"]


def stop_in(module, name):
    """Make the process stop (SIGSTOP) when it comes to `module.name`."""
    inner = getattr(module, name)

    def stopping(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGSTOP)
        return inner(*args, **kwargs)
    setattr(module, name, stopping)


def wait_stopped(child):
    pid, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), child.output


def test_second_run_is_refused(case, tmp_path):
    stage, old_argv, new_argv, old, new = case
    out = tmp_path / "out"
    finish(stage, *old_argv(out))
    first = Fork(stage, new_argv(out), before=lambda: stop_in(output_folder, "_take_place"))
    wait_stopped(first)
    assert "another run is writing" in refused(stage, *new_argv(out))
    # by whatever name
    assert "another run is writing" in refused(stage, *old_argv(os.path.join(out, "..", "out")))
    # the folder next to it is free
    finish(stage, *old_argv(tmp_path / "beside"))
    assert fingerprint(out) == old
    first.kill(signal.SIGCONT)
    assert first.wait() == 0 and fingerprint(out) == new
    assert sorted(os.listdir(tmp_path)) == ["beside", "out"]


def test_lock_goes_with_the_process(case, tmp_path):
    stage, old_argv, new_argv, old, new = case
    out = tmp_path / "out"
    first = Fork(stage, old_argv(out), before=lambda: stop_in(output_folder, "_take_place"))
    wait_stopped(first)
    refused(stage, *new_argv(out))
    first.kill()
    first.wait()
    finish(stage, *new_argv(out))
    assert fingerprint(out) == new and os.listdir(tmp_path) == ["out"]


def test_many_at_once(case, tmp_path):
    """Of runs started together some may be refused, but each that says it is done has written all, and nothing is mixed."""
    stage, old_argv, new_argv, old, new = case
    out = tmp_path / "out"
    children = [Fork(stage, (old_argv if i % 2 else new_argv)(out)) for i in range(6)]
    ends = [child.wait() for child in children]
    assert 0 in ends and set(ends) <= {0, 2}, [child.output for child in children]
    assert all("another run is writing" in child.output for child, end in zip(children, ends) if end == 2)
    assert fingerprint(out) in (old, new) and os.listdir(tmp_path) == ["out"]


def test_interrupted(case, tmp_path):
    """Ctrl-C: the old files stay and nothing is left beside them."""
    stage, old_argv, new_argv, old, new = case
    out = tmp_path / "out"
    finish(stage, *old_argv(out))
    child = Fork(stage, new_argv(out), before=lambda: stop_in(output_folder, "_take_place"))
    wait_stopped(child)
    child.kill(signal.SIGINT)
    child.kill(signal.SIGCONT)
    assert child.wait() == 130 and "Traceback" not in child.output
    assert fingerprint(out) == old and os.listdir(tmp_path) == ["out"]


def test_disk_full(case, tmp_path):
    stage, old_argv, new_argv, old, new = case
    out = tmp_path / "out"
    finish(stage, *old_argv(out))
    line = refused(stage, *new_argv(out), before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    assert f"cannot write {out}" in line and os.strerror(errno.EFBIG) in line
    assert fingerprint(out) == old and os.listdir(tmp_path) == ["out"]


def test_foreign_files_are_never_replaced(case, tmp_path):
    stage, old_argv, new_argv, *_ = case
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in refused(stage, *new_argv(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["thesis.txt"] and os.listdir(tmp_path) == ["out"]
    (tmp_path / "file").write_text("x")
    assert "cannot write" in refused(stage, *new_argv(tmp_path / "file"))
