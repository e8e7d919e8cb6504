"""chat.py through pipes: one message in, one answer out, for people and as JSON.

Most run in a fork of the test process, so that nothing is imported anew.
"""
import json
import os
import re
import shlex
import subprocess
from typing import NamedTuple

import pytest

from support.chat_session import CHAT, LETTERS, write_model
from support.processes import LIMIT, run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat"))


def chat(folder, *argv, stdin=""):
    if isinstance(stdin, str):
        stdin = stdin.encode()
    common = ["--out_dir=tiny", "--device=cpu", "--max_new_tokens=9", "--seed=1"]
    return run("chat", [*common, *argv], folder=folder, stdin=stdin)


def record(folder, *argv, stdin=""):
    """The JSON record of an answer."""
    return json.loads(chat(folder, "--json", *argv, stdin=stdin).out)


def test_a_real_pipe(folder):
    """echo 你好 | python chat.py: the answer alone, as with --prompt=你好."""
    command = "echo 你好 | " + shlex.join([*CHAT, "--max_new_tokens=9"])
    piped = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True,
                           timeout=LIMIT, env=ENVIRONMENT)

    flag = chat(folder, "--prompt=你好")

    assert (piped.returncode, piped.stderr) == (0, "")
    assert re.fullmatch(LETTERS + "+\n", piped.stdout)
    assert (flag.status, flag.out, flag.err) == (0, piped.stdout, "")


@pytest.mark.parametrize("encoding, status", [("gbk", 0), ("utf-8", 2)])
def test_stdin_in_the_encoding_of_the_terminal(folder, encoding, status):
    """A GBK terminal pipes GBK. Where the terminal is UTF-8, the line says what to do."""
    done = subprocess.run([*CHAT, "--json", "--max_new_tokens=5"], cwd=folder, timeout=LIMIT,
                          capture_output=True, input="你好世界".encode("gbk"),
                          env=ENVIRONMENT | {"PYTHONIOENCODING": encoding})

    assert done.returncode == status, done.stderr
    if status == 0:
        assert json.loads(done.stdout.decode("gbk"))["prompt"] == "你好世界"
    else:
        assert "`iconv -f GBK -t UTF-8` converts" in done.stderr.decode()


def test_json_is_one_record(folder):
    text = chat(folder, stdin="你好").out

    done = chat(folder, "--json=True", stdin="你好\r\n")

    assert done.status == 0 and done.err == "" and done.out.count("\n") == 1
    said = json.loads(done.out)
    assert said["prompt"] == "你好" and said["answer"] + "\n" == text
    assert (said["tokens"], said["finish"], said["seed"]) == (9, "length", 1)
    assert said["seconds"] > 0


def test_all_of_stdin_is_one_message(folder):
    lines = "一\n二\n\n三"

    piped = record(folder, stdin=lines + "\n")

    assert piped["prompt"] == lines
    assert record(folder, "--prompt=-", stdin=lines)["answer"] == piped["answer"]
    advised = record(folder, "--system=助手", stdin=lines)
    assert advised["prompt_tokens"] > piped["prompt_tokens"]


class Refusal(NamedTuple):
    says: str
    argv: list = []
    stdin: bytes = b"x"


REFUSED = {
    "nothing": Refusal("there is no message: stdin is empty", stdin=b""),
    "a blank line": Refusal("there is no message: stdin holds only spaces", stdin=b" \n"),
    "a blank prompt": Refusal("there is no message: --prompt holds only spaces", ["--prompt= "]),
    "no UTF-8": Refusal("the prompt is not UTF-8 text", stdin=b"\xff\xfe"),
    "too long": Refusal("tokens long", ["--prompt=" + "长" * 999]),
    "too long for truncate_ctx": Refusal(
        "the context holds 20", ["--truncate_ctx=20", "--prompt=" + "长" * 20]),
    "negative truncate_ctx": Refusal("truncate_ctx=-1", ["--truncate_ctx=-1"]),
    "top_p of 0": Refusal("top_p=0.0 must be", ["--top_p=0"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_status_2(folder, name):
    case = REFUSED[name]

    done = chat(folder, *case.argv, stdin=case.stdin)

    assert done.status == 2 and done.out == ""
    assert done.err.count("\n") == 1 and case.says in done.err, done.err
