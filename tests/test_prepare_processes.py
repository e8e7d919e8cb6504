"""Encoding on many processes: the same bytes, and no process outlives the run, however it ends."""
import errno
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from minillm import encode_ahead as module
from minillm.encode_ahead import encode_ahead
from minillm.errors import UserError
from support import ROOT
from support.encoders import Dies, Doubles, FailsAtSeven
from support.preparation_runs import chats, command, fingerprint, texts, write_chats, write_texts
from support.processes import LIMIT, stat_fields, wait_until
from support.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A tokenizer, and a file for each stage; two lines of the text are broken."""
    folder = tmp_path_factory.mktemp("corpus")
    make_tokenizer(folder / "tokenizer")
    write_texts(folder / "prepare_pretrain.jsonl", texts(400))
    write_chats(folder / "prepare_sft.jsonl", chats(200))
    with open(folder / "prepare_pretrain.jsonl", "ab") as file:
        file.write(b"{\n\xff\n\n")
    text = (folder / "prepare_pretrain.jsonl").read_bytes()
    (folder / "train_tokenizer.jsonl").write_bytes(text)
    return folder


def argv(corpus, stage, out, *more):
    arguments = [f"{corpus}/{stage}.jsonl", f"--out_dir={out}", *more]
    if stage == "train_tokenizer":
        return [*arguments, "--vocab_size=300"]
    return [*arguments, f"--tokenizer={corpus}/tokenizer", "--val_fraction=0.1",
            "--batch_size=3000"]


@pytest.mark.parametrize("stage", ["prepare_pretrain", "prepare_sft", "train_tokenizer"])
def test_same_bytes_for_any_number_of_processes(corpus, tmp_path, stage):
    found = []
    for processes in (1, 2, 5):
        out = tmp_path / str(processes)
        command(stage, *argv(corpus, stage, out, f"--processes={processes}"))
        found.append(fingerprint(out))

    assert found[0] == found[1] == found[2] and len(found[0]) > 1


def encoded_until_error(encoder, blocks, processes):
    """(the results, the UserError behind them)."""
    found = []
    with pytest.raises(UserError) as error:
        for result in encode_ahead(encoder, blocks, processes):
            found.append(result)
    return found, str(error.value)


@pytest.fixture(params=["fork", "spawn"])
def start(request, monkeypatch):
    """Both ways of starting a process, whatever the system's is."""
    monkeypatch.setattr(module, "START", request.param)


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order_and_before_an_error_of_the_reader(processes, start):
    def blocks():
        yield from range(20)
        raise UserError("the reader failed")

    found, error = encoded_until_error(Doubles(), blocks(), processes)

    assert found == [2 * number for number in range(20)] and error == "the reader failed"


@pytest.mark.parametrize("processes", [1, 3])
def test_an_error_of_a_worker_is_that_of_the_run(processes, start):
    found, error = encoded_until_error(FailsAtSeven(), range(20), processes)

    assert found == list(range(7)) and error == "block 7 is bad"


def test_a_worker_that_is_killed_is_one_line(start):
    found, error = encoded_until_error(Dies(), range(20), 2)

    assert not found
    assert "was killed, perhaps for memory: --processes=1 takes less" in error


def test_a_process_that_cannot_start_is_one_line(monkeypatch):
    """Those that have started end: without that this process would wait for them for ever."""
    fork, forks = os.fork, []

    def third_fails():
        forks.append(None)
        if len(forks) == 3:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()
    monkeypatch.setattr(module, "START", "fork")
    monkeypatch.setattr(os, "fork", third_fails)

    found, error = encoded_until_error(Doubles(), range(20), 4)

    assert not found and error.startswith("cannot start 4 processes (")
    assert error.endswith("--processes=2 takes fewer")
    wait_until(lambda: not multiprocessing.active_children())


def test_no_place_for_the_locks_of_several_processes_is_one_line(monkeypatch):
    """As in a container without /dev/shm. It is not the folder of the output that is at fault."""
    def refuse(*arguments):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    monkeypatch.setattr("_multiprocessing.SemLock", refuse)

    found, error = encoded_until_error(Doubles(), range(20), 4)

    assert not found and error.startswith("cannot start 4 processes (No such file")
    assert error.endswith("--processes=1 takes fewer")


def test_strict_stops_at_the_first_bad_line_of_the_file(corpus, tmp_path):
    """Another process may be the first to meet a later one."""
    arguments = argv(corpus, "prepare_pretrain", tmp_path / "o", "--processes=3", "--strict")
    done = subprocess.run([sys.executable, "-m", "prepare_pretrain", *arguments], cwd=ROOT,
                          text=True, capture_output=True)

    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "jsonl:401: malformed JSON" in done.stderr and os.listdir(tmp_path) == []


def group_members(group):
    """The ids of a process group's processes that are alive."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, member_of = stat_fields(f"/proc/{name}/stat")[:3]
        except OSError:
            continue
        if int(member_of) == group and state != "Z":
            found.append(int(name))
    return found


def threads_stopped(pid):
    """Whether none of a process's threads runs: a signal takes a moment to reach each of them."""
    for name in os.listdir(f"/proc/{pid}/task"):
        try:
            state = stat_fields(f"/proc/{pid}/task/{name}/stat")[0]
        except OSError:                          # the thread has just ended
            return False
        if state != "T":
            return False
    return True


def start_endless(corpus, tmp_path):
    """A run with three processes that encode, in a group of its own. Its input is a pipe."""
    os.mkfifo(tmp_path / "endless.jsonl")
    arguments = [f"{tmp_path}/endless.jsonl", f"--tokenizer={corpus}/tokenizer",
                 f"--out_dir={tmp_path}/o", "--processes=3", "--batch_size=1000"]
    return subprocess.Popen([sys.executable, "-m", "prepare_pretrain", *arguments], cwd=ROOT,
                            text=True, stderr=subprocess.PIPE, start_new_session=True)


def open_input(run, tmp_path):
    """The pipe to write the run's input to, once it reads there; fails if it ends before."""
    opened = []

    def is_read():
        assert run.poll() is None, run.stderr.read()
        try:
            opened.append(os.open(tmp_path / "endless.jsonl", os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO    # nobody reads
        return opened
    wait_until(is_read)
    os.set_blocking(opened[0], True)
    return os.fdopen(opened[0], "w")


ENDS = [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("number, status", ENDS)
def test_nothing_is_left_of_a_run_that_is_stopped(corpus, tmp_path, number, status):
    """Its input is a pipe that does not end, so it is at work when the signal comes.

    Ctrl-C goes to all of its processes, the others to the first alone.
    """
    run = start_endless(corpus, tmp_path)
    with open_input(run, tmp_path) as pipe:
        for text in texts(2000):
            pipe.write('{"text": "%s"}\n' % text.replace("\n", ""))
        pipe.flush()
        # itself and some that encode
        wait_until(lambda: len(group_members(run.pid)) >= 3)

        if number == signal.SIGINT:
            os.killpg(run.pid, number)
        else:
            run.send_signal(number)
            wait_until(lambda: not group_members(run.pid))
    _, errors = run.communicate(timeout=LIMIT)

    wait_until(lambda: not group_members(run.pid))
    assert run.returncode == status and "Traceback" not in errors
    assert not os.path.exists(tmp_path / "o")


@pytest.mark.skipif(module.START != "fork" or not os.path.isdir("/proc/self"),
                    reason="looks for forked processes in /proc")
def test_processes_do_not_wait_for_one_another_to_end(corpus, tmp_path):
    """The last one is stopped when the run is killed; the others end nevertheless."""
    run = start_endless(corpus, tmp_path)
    with open_input(run, tmp_path):
        wait_until(lambda: len(group_members(run.pid)) == 4)
        last = max(set(group_members(run.pid)) - {run.pid})
        # it has begun: it has a thread that watches for the end
        wait_until(lambda: len(os.listdir(f"/proc/{last}/task")) > 1)

        os.kill(last, signal.SIGSTOP)
        try:
            wait_until(lambda: threads_stopped(last))
            run.kill()
            wait_until(lambda: group_members(run.pid) == [last])
        finally:
            os.kill(last, signal.SIGKILL)
    run.communicate(timeout=LIMIT)
