"""scripts/download_data.sh, from a server that breaks connections and does worse."""
import math
import os
import random
import shlex
import shutil
import signal
import subprocess

import pytest

from support import ROOT
from support.corpus_server import (CHATS, CHATS_PATH, TEXT, TEXT_PATH, Server, corpora, json_lines,
                                   text_archive)
from support.preparation_runs import chats, texts
from support.processes import LIMIT, wait_until

SCRIPT = f"{ROOT}/scripts/download_data.sh"
pytestmark = pytest.mark.skipif(not shutil.which("curl") or not shutil.which("bash"),
                                reason="needs bash and curl")


@pytest.fixture
def server():
    server = Server(corpora())
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def part(tmp_path):
    """What has been fetched of the conversations."""
    return tmp_path / "data" / "raw" / f"{CHATS}.part"


def start(server, tmp_path, *arguments, **env):
    env = {"MODELSCOPE_ENDPOINT": server.base, "HF_ENDPOINT": server.base, "RETRIES": "3",
           "RETRY_DELAY": "0.05", "no_proxy": "127.0.0.1", **env}
    return subprocess.Popen([SCRIPT, *arguments], cwd=tmp_path, env=os.environ | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def download(server, tmp_path, *arguments, **env):
    """(exit status, stdout, stderr)."""
    child = start(server, tmp_path, *arguments, **env)
    out, err = child.communicate(timeout=LIMIT)
    return child.returncode, out, err


def fetched(tmp_path):
    folder = tmp_path / "data" / "raw"
    if not folder.exists():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_server_that_does_not_answer(server, tmp_path):
    status, out, err = download(server, tmp_path, "belle", HF_ENDPOINT="http://127.0.0.1:9")

    assert status == 2 and "no answer, trying again (2 of 3)" in out and "(3 of 3)" not in out
    assert "check the network" in err


# ---- transfers that break

@pytest.mark.parametrize("redirect", [False, True])
def test_broken_connections_are_resumed(server, tmp_path, redirect):
    server.drop, server.redirect = 20_000, redirect

    code, _, err = download(server, tmp_path)

    assert code == 0, err
    assert fetched(tmp_path) == server.files
    for name, data in server.files.items():
        answers = [(first or 0, sent) for asked, first, sent in server.asked if asked == name]
        # nothing is fetched twice
        assert len(answers) == math.ceil(len(data) / 20_000) > 2
        assert [first for first, _ in answers] == list(range(0, len(data), 20_000))
        assert sum(sent for _, sent in answers) == len(data)


def test_killed_and_started_again(server, tmp_path, part):
    server.hold_at = 16384
    child = start(server, tmp_path, "belle")
    wait_until(lambda: part.exists() and part.stat().st_size >= 4096)

    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    had = part.stat().st_size
    assert 0 < had < len(server.files[CHATS]) and CHATS not in fetched(tmp_path)

    server.hold_at, server.asked = None, []
    code, out, err = download(server, tmp_path, "belle")

    assert code == 0, err
    assert f"going on at byte {had} of" in out
    assert [first for _, first, _ in server.asked] == [had]
    assert fetched(tmp_path) == {CHATS: server.files[CHATS]}


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    assert download(server, tmp_path, "belle")[0] == 0
    server.asked = []

    code, out, _ = download(server, tmp_path, "belle")

    assert code == 0 and not server.asked and "is there" in out
    assert "prepare_sft.py" in out and "prepare_pretrain" not in out


def test_server_busy_at_first(server, tmp_path):
    server.refuse = 2

    assert download(server, tmp_path, "belle")[0] == 0

    assert fetched(tmp_path)[CHATS] == server.files[CHATS]


def test_server_that_cannot_resume(server, tmp_path, part):
    server.ranges = False
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files[CHATS][:5000])

    code, out, err = download(server, tmp_path, "belle")

    assert code == 0, err
    assert "cannot resume" in out and fetched(tmp_path) == {CHATS: server.files[CHATS]}


def test_part_larger_than_the_file(server, tmp_path, part):
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (len(server.files[CHATS]) + 1))

    code, out, _ = download(server, tmp_path, "belle")

    assert code == 0 and "starting over" in out
    assert fetched(tmp_path) == {CHATS: server.files[CHATS]}


def test_two_at_once(server, tmp_path, part):
    if not shutil.which("flock"):
        pytest.skip("needs flock")
    server.hold_at = 4096
    first = start(server, tmp_path, "belle")
    wait_until(part.exists)

    code, _, err = download(server, tmp_path, "belle")

    assert code == 2 and "under way" in err
    server.go_on.set()
    first.communicate(timeout=LIMIT)
    assert first.returncode == 0
    assert fetched(tmp_path) == {CHATS: server.files[CHATS]}


# ---- servers that give nothing, or something else

@pytest.mark.parametrize("fault", ["missing", "silent", "refusing", "gone"])
def test_server_that_gives_nothing(server, tmp_path, fault):
    env = {}
    if fault == "missing":
        del server.files[CHATS]
    if fault == "silent":
        server.silent = True
    if fault == "refusing":
        server.refuse = 1000
    if fault == "gone":
        env = {"HF_ENDPOINT": "http://127.0.0.1:9"}

    code, _, err = download(server, tmp_path, "belle", **env)

    assert code == 2 and CHATS not in fetched(tmp_path)
    last = err.splitlines()[-1]
    assert last.startswith("download_data.sh: ") and "/datasets/BelleGroup/train_3.5M_CN" in last


@pytest.mark.parametrize("content", [b"<html>please log in</html>\n" * 50,
                                     b'{"text": "not a conversation"}\n' * 50])
def test_what_does_not_parse_is_set_aside(server, tmp_path, content):
    server.files[CHATS] = content

    code, out, err = download(server, tmp_path, "belle")

    assert code == 2 and "cannot be read" in err and "next:" not in out
    assert fetched(tmp_path) == {f"{CHATS}.damaged": content}


# ---- addresses, arguments, what comes next

LOGGING_CURL = """#!/bin/sh
for last; do :; done
echo "$last" >>"$LOG"
exit 6
"""
ADDRESSES = [
    (["belle"], f"https://hf-mirror.com{CHATS_PATH}"),
    (["belle", "--huggingface"], f"https://huggingface.co{CHATS_PATH}"),
    (["seq-monkey"], f"https://www.modelscope.cn{TEXT_PATH}"),
]


@pytest.mark.parametrize("arguments, address", ADDRESSES)
def test_where_it_fetches_from(tmp_path, arguments, address):
    """The real addresses, by a curl that only writes down what it is asked for."""
    curl = tmp_path / "bin" / "curl"
    curl.parent.mkdir()
    curl.write_text(LOGGING_CURL)
    curl.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.endswith("_ENDPOINT")}
    env["PATH"] = f"{curl.parent}:{env['PATH']}"
    env |= {"LOG": f"{tmp_path}/log", "RETRIES": "1", "RETRY_DELAY": "0"}

    done = subprocess.run([SCRIPT, *arguments, f"--out={tmp_path}/raw"], env=env,
                          capture_output=True)

    assert done.returncode == 2
    assert (tmp_path / "log").read_text().split() == [address]


def test_unknown_argument(tmp_path):
    done = subprocess.run([SCRIPT, "wiki"], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 2 and "unknown argument wiki" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_comment_that_zsh_hands_on_is_none(server, tmp_path):
    status, _, _ = download(server, tmp_path, "belle", "#", "--huggingface:", "wiki")

    assert status == 0 and list(fetched(tmp_path)) == [CHATS]


def test_help(tmp_path):
    done = subprocess.run([SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0 and "seq-monkey" in done.stdout and "set -" not in done.stdout


def next_steps(out):
    """The commands that are printed, as a shell reads them."""
    return [shlex.split(line) for line in out.split("next:\n")[1].splitlines()]


@pytest.mark.parametrize("folder", ["my data", "it's; $x", "数据"])
def test_next_steps_quote_their_files(server, tmp_path, folder):
    _, out, _ = download(server, tmp_path, f"--out={folder}", LC_ALL="C.UTF-8")

    assert [argument for _, _, argument in next_steps(out)][:3] == [
        f"{folder}/{TEXT}", f"{folder}/{TEXT}", f"{folder}/{CHATS}"]


def test_next_steps_can_be_run(server, tmp_path):
    _, out, _ = download(server, tmp_path)

    steps = next_steps(out)
    assert [script for _, script, _ in steps] == [
        "train_tokenizer.py", "prepare_pretrain.py", "prepare_sft.py", "train.py", "train.py"]
    for _, script, argument in steps:
        assert os.path.exists(f"{ROOT}/{script}")
        assert os.path.exists(tmp_path / argument) or os.path.exists(f"{ROOT}/{argument}")


def test_the_first_records_are_shown(server, tmp_path):
    _, out, _ = download(server, tmp_path)

    for text in (texts(1)[0], chats(1)[0][0]["content"]):
        assert text[:8].split()[0] in out


# ---- a part of seq-monkey

def large_text(server):
    """Let the server have an archive of more than a megabyte; returns the text in it."""
    rng = random.Random(1)
    content = json_lines({"text": "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(400))}
                         for _ in range(2000))
    server.files[TEXT] = text_archive(content)
    assert len(server.files[TEXT]) > 1_100_000
    return content


def test_a_part_of_seq_monkey_is_unpacked_to_whole_lines(server, tmp_path):
    content = large_text(server)
    server.drop = 400_000

    code, out, err = download(server, tmp_path, "seq-monkey", "--part=1")

    assert code == 0, err
    files = fetched(tmp_path)
    data = files["seq_monkey_part.jsonl"]
    assert files.keys() == {"seq_monkey_part.jsonl", "seq_monkey_part.jsonl.mb"}
    assert "seq_monkey_part.jsonl" in out.split("next:")[1]
    assert content.startswith(data) and data.endswith(b"\n")
    assert len(content) / 4 < len(data) < len(content)
    assert [first or 0 for _, first, _ in server.asked] == [0, 400_000, 800_000]


def test_a_part_of_another_size_is_not_taken_for_the_one_asked_for(server, tmp_path):
    content = large_text(server)
    download(server, tmp_path, "seq-monkey", "--part=1")
    path = tmp_path / "data/raw/seq_monkey_part.jsonl"

    same = download(server, tmp_path, "seq-monkey", "--part=1")
    code, _, err = download(server, tmp_path, "seq-monkey", "--part=3")
    path.unlink()
    larger = download(server, tmp_path, "seq-monkey", "--part=3")
    smaller = download(server, tmp_path, "seq-monkey", "--part=1")

    assert same[0] == larger[0] == 0 and "is there" in same[1]
    assert (code, smaller[0]) == (2, 2)
    assert "seq_monkey_part.jsonl holds the first 1 MB, 3 asked for: remove it first" in err
    assert "holds the first 3 MB, 1 asked for" in smaller[2]
    assert path.read_bytes() == content


def test_a_part_from_before_its_size_was_written_is_kept(server, tmp_path):
    large_text(server)
    download(server, tmp_path, "seq-monkey", "--part=1")
    (tmp_path / "data/raw/seq_monkey_part.jsonl.mb").unlink()

    assert download(server, tmp_path, "seq-monkey", "--part=3")[0] == 0


@pytest.mark.parametrize("flag", ["--part=x", "--part=0", "--part=1.5"])
def test_a_part_that_is_no_number_of_megabytes(server, tmp_path, flag):
    code, _, err = download(server, tmp_path, flag)

    assert code == 2 and flag in err and not fetched(tmp_path)
