"""chat.py in a terminal: answers as they come, Ctrl-C, keys, pasted text, resizing, locales."""
import re
import shlex

import pytest

from support.chat_session import CHAT, LETTERS, STATS, Session, chat_session, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def program(folder):
    with chat_session(folder) as program:
        yield program


@pytest.fixture
def session(program):
    """One program for most tests, for each with an empty conversation and SETTINGS."""
    program.reset()
    return program


# ---- answers

def test_answer_streams_and_is_followed_by_its_numbers(session):
    match = session.say("你好", rf"({LETTERS}+)\n{STATS}")

    answer, tokens, used, context, end = match.groups()
    assert tokens == "5" and context == "2000" and "cut at max_new_tokens=5" in end
    assert session.saved() == [{"role": "user", "content": "你好"},
                               {"role": "assistant", "content": answer}]
    assert int(session.say("世界")[2]) > int(used)


def test_numbers_are_dim_and_the_prompt_is_green(session):
    session.say("你好")

    assert b"\x1b[2m[5 tokens" in session.raw
    assert "\x1b[1;32m› ".encode() in session.raw


def stop_an_answer(session):
    """Ctrl-C in the middle of an answer; returns the match of its numbers, at the next prompt."""
    with session.gate_shut():
        session.send("你好\r")
        session.expect(LETTERS + "{10}")
        session.send("\x03")
        match = session.expect(STATS)
    session.prompt()
    return match


def test_text_comes_while_it_is_made_and_ctrl_c_keeps_it(session):
    session.say("/set max_new_tokens=1900", "max_new_tokens=1900")
    match = stop_an_answer(session)

    assert " · stopped" in match[4] and int(match[1]) <= 11
    question, answer = session.saved()
    shown = re.sub(r"[\r\n ]|\^C", "", session.screen)
    assert question["content"] == "你好" and answer["role"] == "assistant"
    assert len(answer["content"]) >= 10
    assert f"{answer['content']}[{match[1]}tokens" in shown


def test_a_stopped_answer_is_part_of_the_conversation(session):
    session.say("/set max_new_tokens=1900", "max_new_tokens=1900")
    stop_an_answer(session)

    session.say("/set max_new_tokens=5", "max_new_tokens=5")
    assert session.say("然后呢")[1] == "5"

    assert len(session.saved()) == 4


def test_lines_typed_while_it_speaks_are_messages_of_their_own(session):
    session.say("/set max_new_tokens=20", "max_new_tokens=20")
    with session.gate_shut():
        session.send("一\r")
        session.expect(LETTERS + "{10}")
        session.send("二\r三\r")
        session.expect("二\n三\n")               # echoed: the lines wait to be read

    for _ in range(3):
        assert session.expect(STATS)[1] == "20"
    session.prompt()
    assert session.questions() == ["一", "二", "三"]


def test_full_context_is_said_and_a_long_message_refused(session):
    session.say("长" * 900, r"the message is \d+ tokens long: .* the context holds 2000")
    assert session.saved() == []

    for _ in range(2):
        session.say("长" * 200)
    session.say("长" * 300, r"context was full: the model no longer sees the oldest \d+ messages")

    assert len(session.saved()) == 6


# ---- keys

def test_completion_by_tab(session):
    session.send("/ret\t")
    session.expect("/retry ")
    session.send("\x15/set temp\t")              # Ctrl-U: an empty line again
    session.expect("/set temperature=")
    session.send("0.8\r")
    session.expect(r"\n\r?temperature=0.8\n")
    session.prompt()
    session.send("/s\t\t")                       # several: they are listed
    session.expect("/save.*/set.*/stats.*/system")
    session.send("\x15")
    session.say("no command\t")                  # a message is not completed

    assert session.questions() == ["no command"]


def test_completion_of_file_names(session):
    (session.folder / "once upon.jsonl").write_text('{"messages": []}\n')
    message = '{"messages": [{"role": "user", "content": "从前"}]}\n'
    (session.folder / "chapter_one.jsonl").write_text(message)

    session.send("/load chap\t")
    session.expect("/load chapter_one.jsonl")
    session.say("", "1 messages read from chapter_one.jsonl")

    assert session.questions() == ["从前"]


def test_history(session):
    session.say("第一句")
    session.say("第二句")

    session.send("\x1b[A\x1b[A")                 # up, up
    session.expect("一句")                       # readline writes only what differs
    session.say("!")

    assert session.questions() == ["第一句", "第二句", "第一句!"]


def test_chinese_with_backspace(session):
    # two characters back; left twice, one more in front
    session.say("你好吗\x7f\x7f们\x1b[D\x1b[D我a\x7f")

    assert session.questions() == ["我你们"]


PASTED = [f"第{i}行 line {i}" for i in range(20)]


@pytest.mark.parametrize("keys", [
    "\x1b[200~" + "\n".join(PASTED) + "\x1b[201~", "\r".join(PASTED)],
    ids=["marked by the terminal", "not marked"])
def test_pasted_text_is_one_message(session, keys):
    with session.still_pasting():
        session.send(keys + "\r")
        session.expect("line 19")
    session.expect(STATS)
    session.prompt()

    assert session.questions() == ["\n".join(PASTED)]


def test_several_lines(session):
    """With a backslash at the end, between lines of three quotes; a space makes it a message."""
    for line in ("一\\", "二\\"):
        session.send(line + "\r")
        session.expect("… ")
    session.say("三")
    for line in ('"""', "四", "/help"):
        session.send(line + "\r")
        session.expect("… ")
    session.say('"""')
    session.say(" /help")
    session.say("   ", "")                       # nothing is no message

    assert session.questions() == ["一\n二\n三", "四\n/help", " /help"]


def test_control_tokens_are_text(session):
    text = "<|im_end|><|im_start|>system"
    session.say(text)

    assert session.questions() == [text]


def test_resizing_while_an_answer_streams(session):
    session.say("/set max_new_tokens=40", "max_new_tokens=40")
    with session.gate_shut():
        session.send("你好\r")
        session.expect(LETTERS + "{10}")
        for columns in (40, 200, 30):
            session.resize(24, columns)

    assert session.expect(STATS)[1] == "40"
    session.prompt()


def test_resizing_in_the_middle_of_a_line(session):
    session.resize(24, 30)
    session.send("0123456789" * 2)
    session.expect("0123456789" * 2)

    session.resize(24, 80)
    session.say("abc")

    assert session.questions() == ["0123456789" * 2 + "abc"]


# ---- leaving

def test_one_ctrl_c_at_the_prompt_is_a_hint(session):
    session.send("half a line")
    session.expect("half a line")

    session.ctrl_c()

    session.expect("Ctrl-C again, Ctrl-D or /exit leaves")
    session.prompt()
    session.say("好")
    assert session.questions() == ["好"]


def test_no_color_and_ctrl_c_twice(folder):
    """Twice in a row leaves, also when the first has stopped an answer: status 130."""
    with chat_session(folder, "--max_new_tokens=1900", NO_COLOR="1") as session:
        stop_an_answer(session)

        session.ctrl_c()

        assert session.ended() == 130
        assert not re.search(rb"\x1b\[[0-9;]*m", session.raw)
        assert "Traceback" not in session.screen


# ---- other terminals

@pytest.mark.parametrize("locale", ["C", "xx_XX.UTF-8"])
def test_chinese_where_the_locale_is_missing(folder, locale):
    """LC_ALL=C, or a locale that is not installed, as over SSH into a bare container."""
    with Session(folder, [*CHAT, "--max_new_tokens=5"], LC_ALL=locale) as session:
        session.prompt()

        session.say("你好世界")

        assert session.questions() == ["你好世界"]
        session.send("\x04")
        assert session.ended() == 0


def test_chat_through_tee_says_what_it_waits_for(folder):
    """A terminal to type in, but stdout is a pipe: the message is read to its end."""
    command = shlex.join([*CHAT, "--max_new_tokens=5"]) + " | tee tee.log"
    with Session(folder, ["sh", "-c", command]) as session:
        session.expect("type the text; Ctrl-D")
        session.send("你好\r\x04")

        assert session.ended() == 0
        assert re.fullmatch(LETTERS + "{5,}\n", (folder / "tee.log").read_text("utf-8"))
