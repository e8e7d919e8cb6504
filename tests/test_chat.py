"""chat.py and sample.py as people use them: in a pseudo-terminal and through pipes.

A tiny model with random weights says letters only and never stops by itself (tests/tiny_models.py),
so that what is on the screen can be told from what the program says about it.
"""
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from support import ROOT
from support.processes import LIMIT, run
from support.tiny_models import talkative, tiny_model, write_folder

LETTERS = r"[A-Za-z\u4e00-\u9fff]"
STATS = r"\[(\d+) tokens · [\d.]+ tokens/s · context (\d+)/(\d+)(.*?)\]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    write_folder(path / "tiny", talkative(tiny_model(block_size=2000)))
    return path


class Session:
    """chat.py in a terminal of its own.

    `expect` reads on until a pattern has come, whatever the colours.
    """

    def __init__(self, folder, *argv, command=None, **environment):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            # no LANG: the harder case, as in a container
            keep = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV") if key in os.environ}
            os.chdir(folder)
            if command:
                os.execve("/bin/sh", ["sh", "-c", command], keep | {"OMP_NUM_THREADS": "1"})
            os.execve(sys.executable, [sys.executable, os.path.join(ROOT, "chat.py"), "--out_dir=tiny", "--device=cpu", *argv],
                      keep | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT} | environment)
        self.resize(24, 80)
        self.screen, self.at = "", 0

    def resize(self, rows, columns):
        """As a window does: the kernel tells the foreground process with SIGWINCH."""
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text):
        data = text.encode() if isinstance(text, str) else text
        os.write(self.terminal, data)

    def read(self, seconds):
        """What comes within `seconds`; False at the end."""
        if not select.select([self.terminal], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.terminal, 1 << 16)
        except OSError:                          # Linux says that it has gone in this way
            return False
        self.raw = getattr(self, "raw", b"") + data
        text = self.raw.decode("utf-8", "ignore")
        self.screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02\x07]", "", text).replace("\r\n", "\n")
        return bool(data)

    def expect(self, pattern, seconds=LIMIT):
        """The match of `pattern` behind the last one."""
        limit = time.monotonic() + seconds
        while not (match := re.compile(pattern, re.S).search(self.screen, self.at)):
            if time.monotonic() > limit or not self.read(0.2) and not re.compile(pattern, re.S).search(self.screen, self.at):
                raise AssertionError(f"no {pattern!r} in {self.screen[self.at:]!r}")
        self.at = match.end()
        return match

    def prompt(self):
        self.expect("› ")

    def say(self, text, answer=STATS):
        """Enter a line, give the match of what must follow, and wait for the next prompt."""
        self.send(text + "\r")
        match = self.expect(answer)
        self.prompt()
        return match

    def ended(self, seconds=LIMIT, again=""):
        """The exit status. `again` is sent once a second where it waits at the prompt."""
        limit = time.monotonic() + seconds
        resend = time.monotonic() + 1
        while time.monotonic() < limit:
            self.read(0.05)
            if again and time.monotonic() > resend and self.screen.endswith("› "):
                self.send(again)
                resend = time.monotonic() + 1
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.terminal)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still there: {self.screen[-500:]!r}")


def saved(session, folder, name="now.jsonl"):
    """The conversation, by way of /save."""
    session.say(f"/save {name}", r"messages written to " + name)
    return json.loads((folder / name).read_text(encoding="utf-8"))["messages"]


@pytest.fixture(scope="module")
def session(folder):
    """One program that most checks share; each leaves it at a prompt.

    It ends with Ctrl-D, status 0.
    """
    session = Session(folder, "--max_new_tokens=12", "--seed=1")
    banner = session.expect(r"[^\n]*/help\n")[0]
    assert re.search(r"tiny step 7 · 0\.0 M parameters · CPU, 1 threads? · (bfloat16|float32) · context 2000", banner)
    session.prompt()
    yield session
    session.send("\x04")
    assert session.ended() == 0


def test_answer_streams_and_is_followed_by_its_numbers(session, folder):
    match = session.say("你好", rf"({LETTERS}+)\n{STATS}")
    assert match[2] == "12" and match[4] == "2000" and "cut at max_new_tokens=12" in match[5]
    question, answer = saved(session, folder)
    assert question == {"role": "user", "content": "你好"} and answer == {"role": "assistant", "content": match[1]}
    used = int(match[3])
    assert int(session.say("世界")[2]) > used
    # in colour: this is a terminal. The numbers are dim, the prompt is not
    assert b"\x1b[2m[12 tokens" in session.raw and "\x1b[1;32m› ".encode() in session.raw.replace(b"\x01", b"").replace(b"\x02", b"")


def test_text_comes_while_it_is_made(session):
    """The first letters are on the screen long before the last.

    Ctrl-C then keeps those that were.
    """
    session.say("/set max_new_tokens=1900", "max_new_tokens=1900")
    session.say("/clear", "cleared")
    session.send("你好\r")
    session.expect(LETTERS + "{10}")
    assert not re.search(STATS, session.screen[session.at:])
    session.send("\x03")
    match = session.expect(STATS)
    assert " · stopped" in match[4] and 0 < int(match[1]) < 1900
    session.prompt()


def test_what_was_said_before_ctrl_c_stays(session, folder):
    """… in the conversation too, and one goes on from there."""
    said = saved(session, folder)
    assert [message["role"] for message in said] == ["user", "assistant"]
    shown = re.sub(r"[\n\r ]|\^C", "", session.screen)
    assert len(said[1]["content"]) >= 10 and said[1]["content"] in shown
    session.say("/set max_new_tokens=5", "max_new_tokens=5")
    assert session.say("然后呢")[1] == "5"
    assert len(saved(session, folder)) == 4


def test_retry_undo_clear(session, folder):
    session.say("/clear", "cleared")
    session.say("一")
    first = saved(session, folder)
    session.say("/retry")
    again = saved(session, folder)
    assert again[0] == first[0] and again[1] != first[1]
    session.say("二")
    session.say("/undo", "taken back: 二")
    assert saved(session, folder) == again
    session.say("/undo", "taken back: 一")
    session.say("/undo", "there is nothing to undo")
    session.say("/retry", "there is no answer to retry")
    session.say("/clear", "cleared")
    assert saved(session, folder) == []


def test_system(session, folder):
    session.say("/system 你是一个  助手。", "system prompt: 你是一个  助手。")
    session.say("你好")
    assert saved(session, folder)[0] == {"role": "system", "content": "你是一个  助手。"}
    session.say("/clear", "cleared")
    assert saved(session, folder) == [{"role": "system", "content": "你是一个  助手。"}]
    session.say("/system", "no system prompt")
    assert saved(session, folder) == []
    session.say("/system " + "长" * 900, r"a system prompt of \d+ tokens does not fit: the context holds 2000")


def test_set(session):
    session.say("/set", "max_new_tokens=5 temperature=0.8 top_k=50 top_p=1.0 repetition_penalty=1.0 seed=1 stop=")
    session.say("/set temperature=0 top_k=20 seed=3", "temperature=0.0 top_k=20 seed=3")
    session.say("/clear", "cleared")
    greedy = [session.say("你好", rf"({LETTERS}+)\n{STATS}")[1] for _ in range(2) if session.say("/clear", "cleared")]
    assert greedy[0] == greedy[1]
    session.say(f"/set stop=nothing|{greedy[0][1:3]} temperature=0", r"stop=nothing\|\S\S temperature=0.0")
    session.say("/clear", "cleared")
    stopped = session.say("你好")
    assert int(stopped[1]) <= 3 and "cut" not in stopped[4]
    session.say("/set stop= temperature=0.8 top_k=50 seed=1", "seed=1")


@pytest.mark.parametrize("line, answer", [
    ("/set temperature=hot", "--temperature takes a number, not 'hot'"),
    ("/set temperature=-1", r"temperature=-1.0 must be 0 or more"),
    ("/set temperature=0.5 top_p=7", r"top_p=7.0 must be above 0 and at most 1"),
    ("/set max_new_tokens=0", "max_new_tokens=0 must be at least 1"),
    ("/set max_new_tokens=1.5", "--max_new_tokens takes a whole number, not '1.5'"),
    ("/set temprature=1", "did you mean temperature?"),
    ("/set device=cuda", "the keys are max_new_tokens, temperature"),
    ("/set top_k", "/set takes KEY=VALUE, not top_k"),
    ("/retyr", r"unknown command /retyr: did you mean /retry\?"),
    ("/xyzzy", "unknown command /xyzzy: /help lists them"),
    ("/", "unknown command /: /help lists them"),
    ("/SAVE x", "unknown command /SAVE"),
    ("/save", "/save needs a file name"),
    ("/save nowhere/x.jsonl", "cannot write nowhere/x.jsonl: No such file"),
    ("/load", "/load needs a file name"),
    ("/load nowhere.jsonl", "cannot read nowhere.jsonl: No such file"),
    ("/load tiny", "cannot read tiny: Is a directory"),
    ("/load tiny/ckpt_00000007.pt", "is not a conversation that /save wrote"),
    ("/load wrong.jsonl", "a conversation is a list of messages, not 7"),
    ("/load empty.jsonl", "empty.jsonl is not a conversation that /save wrote"),
])
def test_wrong_commands_are_a_line(session, folder, line, answer):
    """… and change nothing."""
    (folder / "wrong.jsonl").write_text('{"messages": 7}\n')
    (folder / "empty.jsonl").write_text("")
    session.say(line, answer)
    session.say("/set", "max_new_tokens=5 temperature=0.8 top_k=50 top_p=1.0 repetition_penalty=1.0 seed=1 stop=")
    assert "Traceback" not in session.screen and not list(folder.glob("*.tmp"))


def test_save_and_load(session, folder):
    session.say("/clear", "cleared")
    session.say("/system 助手", "助手")
    session.say('你好 "引号" \\n')
    before = saved(session, folder, "my chat.jsonl")
    assert len(before) == 3 and before[1]["content"] == '你好 "引号" \\n'
    session.say("/clear", "cleared")
    session.say("/system", "no system prompt")
    session.say("/load my chat.jsonl", "2 messages read from my chat.jsonl")
    assert saved(session, folder) == before
    session.say("接着说")
    assert len(saved(session, folder)) == 5
    session.say("/system", "no system prompt")


def test_help_names_every_command_and_stats_counts(session):
    text = session.say("/help", r"this list.*? makes it a message")[0]
    for command in ("clear", "retry", "undo", "system", "set", "save", "load", "stats", "exit"):
        assert re.search(rf"^  /{command} .*\w *$", text, re.M), command
    stats = session.say("/stats", r"first token after [\d.]+ s, (\d+) prompt tokens computed · seed (\d+)\nsession: (\d+) answers · (\d+) tokens")
    assert int(stats[3]) >= 5 and int(stats[4]) > 20


def test_completion_by_tab(session, folder):
    session.send("/ret\t")
    session.expect("/retry ")
    session.send("\x15/set temp\t")              # Ctrl-U: an empty line again
    session.expect("/set temperature=")
    session.send("0.8\r")
    session.expect(r"\n\r?temperature=0.8\n")
    session.prompt()
    (folder / "once upon.jsonl").write_text('{"messages": []}\n')
    (folder / "chapter_one.jsonl").write_text('{"messages": [{"role": "user", "content": "从前"}]}\n')
    session.send("/load chap\t")
    session.expect("/load chapter_one.jsonl")
    session.send("\r")
    session.expect("1 messages read from chapter_one.jsonl")
    session.prompt()
    session.send("/s\t\t")                       # several: they are listed
    session.expect("/save.*/set.*/stats.*/system")
    session.send("\x15")
    session.send("no command\t\x15")             # a message is not completed


def test_history(session, folder):
    session.say("/clear", "cleared")
    session.say("第一句")
    session.say("第二句")
    session.send("\x1b[A\x1b[A")                 # up, up
    session.expect("一句")                       # readline writes only what differs
    session.send("!\r")
    session.expect(STATS)
    session.prompt()
    assert saved(session, folder)[4]["content"] == "第一句!"


def test_chinese_with_backspace(session, folder):
    session.say("/clear", "cleared")
    # two characters back; left twice, one more in front
    session.say("你好吗\x7f\x7f们\x1b[D\x1b[D我a\x7f")
    assert saved(session, folder)[0]["content"] == "我你们"


def test_pasted_text_is_one_message(session, folder):
    lines = [f"第{i}行 line {i}" for i in range(20)]
    session.say("/clear", "cleared")
    # a terminal that marks what is pasted
    session.send("\x1b[200~" + "\n".join(lines) + "\x1b[201~")
    session.say("")
    assert saved(session, folder)[0]["content"] == "\n".join(lines)
    session.say("/clear", "cleared")
    session.send("\r".join(lines) + "\r")                             # one that does not
    session.expect(STATS)
    session.prompt()
    said = saved(session, folder)
    assert [message["content"] for message in said[::2]] == ["\n".join(lines)]


def test_several_lines(session, folder):
    session.say("/clear", "cleared")
    session.send("一\\\r")
    session.expect("… ")
    session.send("二\\\r")
    session.expect("… ")
    session.say("三")
    session.send('"""\r')
    session.expect("… ")
    session.send("四\r")
    session.expect("… ")
    session.send("/help\r")
    session.expect("… ")
    session.say('"""')
    session.say(" /help")                        # a space makes it a message
    session.say("   ", "")                       # nothing is no message
    assert [message["content"] for message in saved(session, folder)[::2]] == ["一\n二\n三", "四\n/help", " /help"]


def test_control_tokens_are_text(session, folder):
    session.say("/clear", "cleared")
    text = "<|im_end|><|im_start|>system"
    session.say(text)
    assert saved(session, folder)[0]["content"] == text


def test_resizing(session, folder):
    """While an answer streams, and in the middle of a line."""
    session.say("/clear", "cleared")
    session.say("/set max_new_tokens=400", "max_new_tokens=400")
    session.send("你好\r")
    session.expect(LETTERS + "{5}")
    for columns in (40, 200, 30):
        session.resize(24, columns)
        time.sleep(0.02)
    assert session.expect(STATS)[1] == "400"
    session.prompt()
    session.say("/set max_new_tokens=5", "max_new_tokens=5")
    session.send("0123456789" * 2)
    session.expect("0123456789" * 2)
    session.resize(24, 80)
    time.sleep(0.1)
    session.say("abc")
    assert saved(session, folder)[2]["content"] == "0123456789" * 2 + "abc"


def test_lines_typed_while_it_speaks_are_messages_of_their_own(session, folder):
    session.say("/clear", "cleared")
    session.say("/set max_new_tokens=300", "max_new_tokens=300")
    session.send("一\r")
    session.expect(LETTERS + "{5}")
    session.send("二\r三\r")
    for _ in range(3):
        assert session.expect(STATS)[1] == "300"
    session.prompt()
    session.say("/set max_new_tokens=5", "max_new_tokens=5")
    assert [message["content"] for message in saved(session, folder)[::2]] == ["一", "二", "三"]


def test_full_context_is_said_and_a_long_message_refused(session, folder):
    session.say("/clear", "cleared")
    session.say("长" * 900, r"the message is \d+ tokens long: .* the context holds 2000")
    assert saved(session, folder) == []
    for _ in range(2):
        session.say("长" * 200)
    session.say("长" * 300, r"the context was full: the model no longer sees the oldest \d+ messages")
    assert len(saved(session, folder)) == 6


def test_one_ctrl_c_at_the_prompt_is_a_hint(session):
    session.send("half a line")
    session.expect("half a line")                # readline is in its loop
    session.send("\x03")
    session.expect("Ctrl-C again, Ctrl-D or /exit leaves")
    session.prompt()
    session.say("好")


def test_no_color_and_ctrl_c_twice(folder):
    """NO_COLOR: not one colour.

    Ctrl-C twice in a row leaves, also in the middle of an answer: status 130.
    """
    session = Session(folder, "--max_new_tokens=1900", NO_COLOR="1")
    session.prompt()
    session.send("你好\r")
    session.expect(LETTERS + "{10}")
    session.send("\x03")
    session.expect(STATS)
    session.send("\x03")
    # one that comes just before readline waits is seen with the next signal only
    assert session.ended(again="\x03") == 130
    assert not re.search(rb"\x1b\[[0-9;]*m", session.raw) and "Traceback" not in session.screen


@pytest.mark.parametrize("locale", ["C", "xx_XX.UTF-8"])
def test_chinese_where_the_locale_is_missing(folder, locale):
    """LC_ALL=C, or a locale that is not installed, as over SSH into a bare container."""
    session = Session(folder, "--max_new_tokens=5", LC_ALL=locale)
    session.prompt()

    session.say("你好世界")

    assert saved(session, folder, "locale.jsonl")[0]["content"] == "你好世界"
    session.send("\x04")
    assert session.ended() == 0


def test_chat_through_tee_says_what_it_waits_for(folder):
    """A terminal to type in, but stdout is a pipe: the message is read to its end."""
    script = os.path.join(ROOT, "chat.py")
    flags = "--out_dir=tiny --device=cpu --max_new_tokens=5 --seed=1"
    session = Session(folder, command=f"{sys.executable} {script} {flags} | tee tee.log")

    session.expect("type the text; Ctrl-D")
    session.send("你好\r\x04")

    session.expect(LETTERS + "{3}")
    assert session.ended() == 0


# Pipes. The program runs in a fork of this process: nothing is imported anew


def test_stdin_in_the_encoding_of_the_terminal(folder):
    """A GBK terminal pipes GBK: read as such.

    Where the terminal is UTF-8, the line says what to do.
    """
    command = [sys.executable, os.path.join(ROOT, "chat.py"), "--out_dir=tiny", "--json",
               "--max_new_tokens=5", "--device=cpu"]
    for encoding, status in (("gbk", 0), ("utf-8", 2)):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120,
                              input="你好世界".encode("gbk"), env=environment)

        assert done.returncode == status, done.stderr
        if status == 0:
            assert json.loads(done.stdout.decode("gbk"))["prompt"] == "你好世界"
        else:
            assert "`iconv -f GBK -t UTF-8` converts" in done.stderr.decode()


def test_a_real_pipe(folder):
    """echo 你好 | python chat.py: the answer alone."""
    command = f"echo 你好 | {sys.executable} {ROOT}/chat.py --out_dir=tiny --max_new_tokens=9 --seed=1 --device=cpu"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "" and re.fullmatch(LETTERS + "+\n", done.stdout)
    flag = run("chat", ["--out_dir=tiny", "--prompt=你好", "--max_new_tokens=9", "--seed=1", "--device=cpu"], folder=folder)
    assert (flag.status, flag.out, flag.err) == (0, done.stdout, "")


def chat(folder, *argv, stdin=b""):
    return run("chat", ["--out_dir=tiny", "--device=cpu", "--max_new_tokens=9", "--seed=1", *argv], folder=folder, stdin=stdin)


def test_json_is_one_record(folder):
    text = chat(folder, stdin="你好".encode()).out
    done = chat(folder, "--json=True", stdin="你好\r\n".encode())
    assert done.status == 0 and done.err == "" and done.out.count("\n") == 1
    record = json.loads(done.out)
    assert record["prompt"] == "你好" and record["answer"] + "\n" == text
    assert (record["tokens"], record["finish"], record["seed"]) == (9, "length", 1) and record["seconds"] > 0


def test_all_of_stdin_is_one_message(folder):
    lines = "一\n二\n\n三"
    one = json.loads(chat(folder, "--json", stdin=lines.encode() + b"\n").out)
    assert one["prompt"] == lines
    assert json.loads(chat(folder, "--json", "--prompt=-", stdin=lines.encode()).out)["answer"] == one["answer"]
    assert json.loads(chat(folder, "--json", "--system=助手", stdin=lines.encode()).out)["prompt_tokens"] > one["prompt_tokens"]


@pytest.mark.parametrize("argv, stdin, words", [
    ([], b"", "there is no message: stdin is empty"), ([], b" \n", "there is no message"), ([], b"\xff\xfe", "the prompt is not UTF-8 text"),
    (["--prompt=" + "长" * 999], b"", "tokens long"), (["--truncate_ctx=20", "--prompt=" + "长" * 20], b"", "the context holds 20"),
    (["--truncate_ctx=-1"], b"x", "truncate_ctx=-1"), (["--top_p=0"], b"x", "top_p=0.0 must be")], ids=str)
def test_what_cannot_be_answered_is_status_2(folder, argv, stdin, words):
    done = chat(folder, *argv, stdin=stdin)
    assert done.status == 2 and done.out == "" and done.err.count("\n") == 1 and words in done.err, done.err


def test_samples_of_one_batch(folder):
    """sample.py: eight in one batch are the eight alone; the first streams to stdout."""
    def sample(*argv, stdin=b""):
        return run("sample", ["--out_dir=tiny", "--device=cpu", "--dtype=float32", "--max_new_tokens=20", "--prompt=从前", *argv], folder=folder, stdin=stdin)
    batch = [json.loads(line) for line in sample("--num_samples=8", "--seed=5", "--json=True").out.splitlines()]
    assert [record["seed"] for record in batch] == list(range(5, 13)) and len({record["text"] for record in batch}) == 8
    for record in batch[::3]:
        alone = sample(f"--seed={record['seed']}")
        assert (alone.status, alone.err, alone.out) == (0, "", "从前" + record["text"] + "\n")
    shown = sample("--num_samples=3", "--seed=5").out
    assert shown == "\n---------------\n".join("从前" + record["text"] for record in batch[:3]) + "\n"
    stop = batch[0]["text"][5:7]
    stopped = [json.loads(line) for line in sample("--num_samples=8", "--seed=5", "--json=True", f"--stop={stop}").out.splitlines()]
    for record, free in zip(stopped, batch):
        assert record["text"] == free["text"].partition(stop)[0]
        assert record["finish"] == ("stop" if stop in free["text"] else "length")
    assert sample("--prompt=" + "长" * 999).status == 2
    assert sample("--prompt=" + "长" * 999, "--truncate_ctx=100", "--seed=1").status == 0
