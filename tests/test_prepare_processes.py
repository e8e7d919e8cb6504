"""Encoding on many processes.

The same bytes, and none of them outlives the run, however it ends.
"""
import os
import signal
import subprocess
import sys
import time

import pytest

from minillm.encode_ahead import encode_ahead
from minillm.errors import UserError
from support import ROOT
from support.preparation_runs import chats, command, fingerprint, texts, write_chats, write_texts
from support.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_tokenizer(folder / "tokenizer")
    write_texts(folder / "prepare_pretrain.jsonl", texts(400))
    write_chats(folder / "prepare_sft.jsonl", chats(200))
    with open(folder / "prepare_pretrain.jsonl", "ab") as file:
        file.write(b"{\n\xff\n" + b"\n")
    (folder / "train_tokenizer.jsonl").write_bytes((folder / "prepare_pretrain.jsonl").read_bytes())
    return folder


def argv(corpus, stage, out, *more):
    arguments = [corpus / f"{stage}.jsonl", f"--out_dir={out}", *more]
    if stage == "train_tokenizer":
        return arguments + ["--vocab_size=300"]
    return arguments + [f"--tokenizer={corpus}/tokenizer", "--val_fraction=0.1", "--batch_size=3000"]


@pytest.mark.parametrize("stage", ["prepare_pretrain", "prepare_sft", "train_tokenizer"])
def test_same_bytes_for_any_number_of_processes(corpus, tmp_path, stage):
    found = []
    for processes in (1, 2, 5):
        command(stage, *argv(corpus, stage, tmp_path / str(processes), f"--processes={processes}"))
        found.append(fingerprint(tmp_path / str(processes)))
    assert found[0] == found[1] == found[2] and len(found[0]) > 1


class Slow:
    """An encoder that says who it is, then waits for ever."""

    def __call__(self, block):
        return block * 2


def test_results_come_in_order_and_errors_where_they_belong():
    """What was read before an error of the reader comes out first."""
    def blocks():
        yield from range(20)
        raise UserError("the reader failed")
    for processes in (1, 3):
        found = []
        with pytest.raises(UserError, match="the reader failed"):
            for result in encode_ahead(Slow(), blocks(), processes):
                found.append(result)
        assert found == [2 * number for number in range(20)]


class Fails:
    def __call__(self, block):
        if block == 7:
            raise UserError("block 7 is bad")
        return block


def test_an_error_of_a_worker_is_that_of_the_run():
    for processes in (1, 3):
        found = []
        with pytest.raises(UserError, match="block 7 is bad"):
            for result in encode_ahead(Fails(), range(20), processes):
                found.append(result)
        assert found == list(range(7))


class Dies:
    def __call__(self, block):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(UserError, match="was killed, perhaps for memory: --processes=1 takes less"):
        list(encode_ahead(Dies(), range(20), 2))


def test_strict_stops_at_the_first_line_of_the_file(corpus, tmp_path):
    """Whichever process is the first to meet a bad one."""
    result = subprocess.run(
        [sys.executable, "-m", "prepare_pretrain", *map(str, argv(corpus, "prepare_pretrain", tmp_path / "o", "--processes=3", "--strict"))],
        cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "jsonl:401: malformed JSON" in result.stderr and os.listdir(tmp_path) == []


def group_members(group):
    """The processes of a process group that are alive."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, member_of = file.read().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(member_of) == group and state != "Z":
            found.append(int(name))
    return found


def wait_until(condition, limit=100):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_nothing_is_left_of_a_run_that_is_stopped(corpus, tmp_path, number, status):
    """The input is a pipe that never ends, so the run is at work when the signal comes.

    To all, as by Ctrl-C, or to it alone.
    """
    os.mkfifo(tmp_path / "endless.jsonl")
    arguments = [tmp_path / "endless.jsonl", f"--tokenizer={corpus}/tokenizer", f"--out_dir={tmp_path}/o", "--processes=3", "--batch_size=1000"]
    run = subprocess.Popen([sys.executable, "-m", "prepare_pretrain", *map(str, arguments)], cwd=ROOT, text=True,
                           stderr=subprocess.PIPE, start_new_session=True)
    with open(tmp_path / "endless.jsonl", "w") as pipe:
        for text in texts(2000):
            pipe.write('{"text": "%s"}\n' % text.replace("\n", ""))
        pipe.flush()
        # itself, one that encodes, and multiprocessing's own
        wait_until(lambda: len(group_members(run.pid)) >= 3)
        if number == signal.SIGINT:
            os.killpg(run.pid, number)
        else:
            run.send_signal(number)
        wait_until(lambda: not group_members(run.pid) or number == signal.SIGINT)
    _, errors = run.communicate(timeout=300)
    wait_until(lambda: not group_members(run.pid))
    assert run.returncode == status and "Traceback" not in errors
    assert not os.path.exists(tmp_path / "o")
