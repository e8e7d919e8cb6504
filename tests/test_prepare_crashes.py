"""Whatever stops a preparation: the old files are whole or the new ones are; the next cleans up."""
import collections
import errno
import os
import pathlib
import random
import resource
import shutil
import signal
from typing import NamedTuple

import pytest

from minillm import atomic_folder
from support.call_clock import CallClock
from support.preparation_runs import (chats, fingerprint, finish, refused, texts, write_chats,
                                      write_texts)
from support.processes import Fork
from support.tiny_tokenizer import make_tokenizer

STAGES = ["prepare_pretrain", "prepare_sft", "train_tokenizer"]


class Case(NamedTuple):
    """A stage, and two inputs of it: "old" and "new"."""
    stage: str
    corpus: pathlib.Path
    old: dict                        # the fingerprint of what the stage makes of it
    new: dict

    def flags(self, out):
        if self.stage == "train_tokenizer":
            return ["--vocab_size=300", f"--out_dir={out}"]
        return [f"--tokenizer={self.corpus}/tokenizer", f"--out_dir={out}", "--val_fraction=0.1",
                "--batch_size=2000"]

    def argv(self, which, out):
        suffix = "json" if self.stage == "prepare_sft" else "jsonl"
        return [self.corpus / f"{which}.{suffix}", *self.flags(out)]

    def finish(self, which, out, before=None):
        return finish(self.stage, *self.argv(which, out), before=before)

    def refused(self, which, out, before=None):
        return refused(self.stage, *self.argv(which, out), before=before)

    def fork(self, which, out, before=None):
        return Fork(self.stage, self.argv(which, out), before=before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_tokenizer(folder / "tokenizer")
    for name, count in (("old", 150), ("new", 400)):
        write_texts(folder / f"{name}.jsonl", texts(count))
        write_chats(folder / f"{name}.json", chats(count))
    return folder


@pytest.fixture(scope="module", params=STAGES)
def case(request, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    prints = {}
    for which in ("old", "new"):
        Case(request.param, corpus, {}, {}).finish(which, folder / which)
        prints[which] = fingerprint(folder / which)
    assert prints["old"] != prints["new"] and len(prints["old"]) > 1
    return Case(request.param, corpus, **prints)


# ---- killed at a random moment

def kill_many(case, tmp_path, kills, seed):
    """Kill runs at random moments; every fourth has no old files to replace.

    Returns how often the old files were left, the new ones, none, and how many runs ended first.
    """
    out, rng, left = tmp_path / "out", random.Random(seed), collections.Counter()
    clock = CallClock()
    case.finish("old", tmp_path / "old")
    assert fingerprint(tmp_path / "old") == case.old
    case.finish("new", tmp_path / "other", before=clock.start)
    duration = clock.ticks[0]

    for number in range(kills):
        first = number % 4 == 3
        shutil.rmtree(out, ignore_errors=True)
        if not first:
            shutil.copytree(tmp_path / "old", out)
        moment = rng.randrange(1, duration * 21 // 20)
        child = case.fork("new", out, before=lambda: clock.start(moment))
        left["ended"] += child.wait() == 0

        found = fingerprint(out)
        allowed = {"new": case.new, "nothing": {}} if first else {"new": case.new, "old": case.old}
        assert found in allowed.values(), f"kill {number}"
        for name, files in allowed.items():
            left[name] += found == files
        if number % 5 == 0 or kills < 10:
            case.finish("new", out)
            assert fingerprint(out) == case.new
            assert sorted(os.listdir(tmp_path)) == ["old", "other", "out"]   # nothing left behind
    case.finish("new", out)
    assert sorted(os.listdir(tmp_path)) == ["old", "other", "out"]
    return left


def test_killed_at_random_moments(case, tmp_path):
    kill_many(case, tmp_path, 6, 0)


@pytest.mark.slow
def test_killed_at_many_random_moments(case, tmp_path):
    left = kill_many(case, tmp_path, 100, 1)

    print(case.stage, dict(left))
    assert left["old"] > 10 and left["nothing"] > 3 and left["ended"] < 50


# ---- killed at every step of the replacement

class Step(NamedTuple):
    name: str
    module: object
    function: str                    # where the run dies
    when: str                        # "before" or "after" this function has done its work
    left: str                        # whose files are then in the folder


STEPS = [
    Step("hidden folder made", atomic_folder.os, "mkdir", "after", "old"),
    Step("nothing synced", atomic_folder, "sync", "before", "old"),
    Step("one file synced", atomic_folder, "sync", "after", "old"),
    Step("all synced", atomic_folder, "_take_place", "before", "old"),
    Step("about to exchange", atomic_folder, "_exchange", "before", "old"),
    Step("exchanged", atomic_folder, "_exchange", "after", "new"),
    Step("in place", atomic_folder, "_take_place", "after", "new"),
]


def die_in(module, name, when):
    """The process dies by SIGKILL in `module.name`, "before" or "after" it has done its work."""
    inner = getattr(module, name)

    def deadly(*args, **kwargs):
        if when == "after":
            inner(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, deadly)


@pytest.mark.parametrize("step", STEPS, ids=[step.name for step in STEPS])
def test_killed_at_every_step(case, tmp_path, step):
    out = tmp_path / "out"
    case.finish("old", out)

    child = case.fork("new", out, before=lambda: die_in(step.module, step.function, step.when))

    assert child.wait() == -signal.SIGKILL, child.output
    assert fingerprint(out) == getattr(case, step.left)
    assert sorted(os.listdir(tmp_path)) == [".out.lock", ".out.partial", "out"]
    case.finish("new", out)
    assert fingerprint(out) == case.new and os.listdir(tmp_path) == ["out"]


def no_exchange():
    """As on a file system that cannot exchange two folders."""
    atomic_folder._exchange = lambda a, b: False


def die_in_second_rename(when):
    """The process dies where the new folder takes its name; the old one has been moved away."""
    inner, calls = os.rename, []

    def rename(a, b):
        calls.append(a)
        if len(calls) == 1:
            inner(a, b)
            return
        if when == "after":
            inner(a, b)
        os.kill(os.getpid(), signal.SIGKILL)
    atomic_folder.os.rename = rename


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_where_folders_cannot_be_exchanged(case, tmp_path, when):
    """The old folder may be away for a moment; the next run brings it back, even one that fails."""
    out, empty = tmp_path / "out", tmp_path / "empty.jsonl"
    case.finish("old", out)
    empty.write_text("")

    def fault():
        no_exchange()
        die_in_second_rename(when)
    child = case.fork("new", out, before=fault)

    assert child.wait() == -signal.SIGKILL
    assert fingerprint(out) == (case.new if when == "after" else {})
    refused(case.stage, empty, *case.flags(out))
    assert fingerprint(out) == (case.new if when == "after" else case.old)
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "out"]
    case.finish("new", out, before=no_exchange)
    assert fingerprint(out) == case.new
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "out"]


# ---- two runs into one folder

def signal_before_replacing(number):
    """The main thread of the process gets the signal when its new files are complete."""
    inner = atomic_folder._take_place

    def signalled(*args):
        signal.raise_signal(number)
        return inner(*args)
    atomic_folder._take_place = signalled


def stopped_run(case, which, out):
    """A run that stands still before it replaces the folder."""
    child = case.fork(which, out, before=lambda: signal_before_replacing(signal.SIGSTOP))
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), child.output
    return child


def test_second_run_is_refused(case, tmp_path):
    out = tmp_path / "out"
    case.finish("old", out)

    first = stopped_run(case, "new", out)

    assert "another run is writing" in case.refused("new", out)
    other_name = os.path.join(out, "..", "out")
    assert "another run is writing" in case.refused("old", other_name)
    case.finish("old", tmp_path / "beside")      # another folder is free
    assert fingerprint(out) == case.old
    first.kill(signal.SIGCONT)
    assert first.wait() == 0 and fingerprint(out) == case.new
    assert sorted(os.listdir(tmp_path)) == ["beside", "out"]


def test_lock_goes_with_the_process(case, tmp_path):
    out = tmp_path / "out"
    first = stopped_run(case, "old", out)
    case.refused("new", out)

    first.kill()
    first.wait()

    case.finish("new", out)
    assert fingerprint(out) == case.new and os.listdir(tmp_path) == ["out"]


def test_many_at_once(case, tmp_path):
    """Some of them may be refused; one that says it is done has written all; nothing is mixed."""
    out = tmp_path / "out"

    children = [case.fork(which, out) for which in ("new", "old") * 3]
    ends = [child.wait() for child in children]

    assert 0 in ends and set(ends) <= {0, 2}, [child.output for child in children]
    for child, end in zip(children, ends):
        assert end == 0 or "another run is writing" in child.output
    assert fingerprint(out) in (case.old, case.new) and os.listdir(tmp_path) == ["out"]


# ---- Ctrl-C, no room, files of others

def test_interrupted(case, tmp_path):
    """Ctrl-C: the old files stay, and nothing is left beside them."""
    out = tmp_path / "out"
    case.finish("old", out)

    child = case.fork("new", out, before=lambda: signal_before_replacing(signal.SIGINT))

    assert child.wait() == 130 and "Traceback" not in child.output
    assert fingerprint(out) == case.old and os.listdir(tmp_path) == ["out"]


def test_disk_full(case, tmp_path):
    out = tmp_path / "out"
    case.finish("old", out)

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    line = case.refused("new", out, before=small_disk)

    assert f"cannot write {out}" in line and os.strerror(errno.EFBIG) in line
    assert fingerprint(out) == case.old and os.listdir(tmp_path) == ["out"]


def test_files_of_others_are_never_replaced(case, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")

    assert "thesis.txt" in case.refused("new", tmp_path / "out")

    assert os.listdir(tmp_path / "out") == ["thesis.txt"] and os.listdir(tmp_path) == ["out"]


def test_a_file_is_no_folder_to_write_to(case, tmp_path):
    (tmp_path / "file").write_text("x")

    assert "cannot write" in case.refused("new", tmp_path / "file")

    assert (tmp_path / "file").read_text() == "x"
