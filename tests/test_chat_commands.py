"""chat.py in a terminal: its commands, what they say and what they change."""
import re

import pytest

from support.chat_session import LETTERS, SETTINGS, STATS, chat_session, write_model


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    with chat_session(write_model(tmp_path_factory.mktemp("chat"))) as program:
        yield program
        program.send("\x04")
        assert program.ended() == 0


@pytest.fixture
def session(program):
    """One program for all tests, for each with an empty conversation and SETTINGS."""
    program.reset()
    return program


def test_banner_names_model_and_machine(program):
    says = (r"tiny step 7 · 0\.0M parameters · CPU, 1 threads? · (bfloat16|float32)"
            r" · context 2000 · /help\n")
    assert re.match(says, program.screen)


def test_retry_answers_anew(session):
    session.say("一")
    question, answer = session.saved()

    session.say("/retry")

    assert session.saved()[0] == question and session.saved()[1] != answer


def test_undo_takes_the_last_exchange_back(session):
    session.say("一")
    before = session.saved()
    session.say("二")

    session.say("/undo", "taken back: 二")
    assert session.saved() == before

    session.say("/undo", "taken back: 一")
    session.say("/undo", "there is nothing to undo")
    session.say("/retry", "there is no answer to retry")


def test_clear_keeps_the_system_prompt(session):
    session.say("/system 你是一个  助手。", "system prompt: 你是一个  助手。")
    system = {"role": "system", "content": "你是一个  助手。"}
    session.say("你好")
    assert session.saved()[0] == system

    session.say("/clear", "cleared")

    assert session.saved() == [system]


def test_system(session):
    session.say("/system 你是一个助手。", "system prompt: 你是一个助手。")
    session.say("/system", "no system prompt")
    assert session.saved() == []
    session.say("/system " + "长" * 900,
                r"a system prompt of \d+ tokens does not fit: the context holds 2000")


def test_set_says_what_it_has_set(session):
    session.say("/set temperature=0 top_k=20 seed=3", "temperature=0.0 top_k=20 seed=3")
    session.say("/set", "max_new_tokens=5 temperature=0.0 top_k=20 top_p=1.0 "
                        "repetition_penalty=1.0 seed=3 stop=")


def test_set_changes_the_answers(session):
    """Greedy answers are the same twice; a stop string ends one."""
    session.say("/set temperature=0", "temperature=0.0")
    first = session.say("你好", rf"({LETTERS}+)\n{STATS}")[1]
    session.say("/clear", "cleared")
    assert session.say("你好", rf"({LETTERS}+)\n{STATS}")[1] == first

    session.say("/clear", "cleared")
    session.say(f"/set stop=nothing|{first[1:3]}", rf"stop=nothing\|{first[1:3]}")
    stopped = session.say("你好")

    assert int(stopped[1]) <= 3 and "cut" not in stopped[4]


WRONG = [
    ("/set temperature=hot", "--temperature takes a number, not 'hot'"),
    ("/set temperature=-1", r"temperature=-1.0 must be 0 or more"),
    ("/set temperature=0.5 top_p=7", r"top_p=7.0 must be above 0 and at most 1"),
    ("/set max_new_tokens=0", "max_new_tokens=0 must be at least 1"),
    ("/set max_new_tokens=1.5", "--max_new_tokens takes a whole number, not '1.5'"),
    ("/set temprature=1", r"did you mean temperature\?"),
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
]


@pytest.mark.parametrize("line, says", WRONG)
def test_a_wrong_command_is_one_line_and_changes_nothing(session, line, says):
    (session.folder / "wrong.jsonl").write_text('{"messages": 7}\n')
    (session.folder / "empty.jsonl").write_text("")

    session.say(line, says)

    session.say("/set", re.escape(SETTINGS))
    assert session.saved() == []
    assert "Traceback" not in session.screen and not list(session.folder.glob("*.tmp"))


@pytest.mark.parametrize("content, kept", [
    (b"notes\n", True),
    (b'{"messages": []}\n{"messages": []}\n', True),         # data for prepare_sft.py
    (b"PK\x03\x04\xff\xfe", True),
    (b'{"messages": {"hello": "hi"}}\n', True),
    (b'{"messages": 5}\n', True),
    (b'{"messages": [], "id": 1}\n', True),                  # one record, with more in it
    (b'{"messages": [{"role": "user", "content": "hi", "name": "A"}]}\n', True),
    (b'{"messages": []}\n', False),
    (b"", False),
])
def test_save_replaces_nothing_but_a_conversation(session, content, kept):
    path = session.folder / "mine.txt"
    path.write_bytes(content)

    session.say("/save mine.txt", "mine.txt exists" if kept else "written to mine.txt")

    assert path.read_bytes() == (content if kept else b'{"messages": []}\n')


def test_save_and_load(session):
    session.say("/system 助手", "助手")
    session.say('你好 "引号" \\n')
    before = session.saved("my chat.jsonl")
    assert len(before) == 3 and before[1]["content"] == '你好 "引号" \\n'

    session.say("/clear", "cleared")
    session.say("/system", "no system prompt")
    session.say("/load my chat.jsonl", "2 messages read from my chat.jsonl")

    assert session.saved() == before
    session.say("接着说")
    assert len(session.saved()) == 5


def test_help_names_every_command(session):
    text = session.say("/help", r"this list.*? makes it a message")[0]
    for command in ("clear", "retry", "undo", "system", "set", "save", "load", "stats", "exit"):
        assert re.search(rf"^  /{command} .*\w *$", text, re.MULTILINE), command


def test_stats_count_answers_and_tokens(session):
    says = (r"first token after [\d.]+ s, \d+ prompt tokens computed · seed \d+\n"
            r"session: (\d+) answers · (\d+) tokens")
    session.say("一")
    before = session.say("/stats", says)

    session.say("二")
    session.say("三")

    after = session.say("/stats", says)
    assert int(after[1]) - int(before[1]) == 2
    assert int(after[2]) - int(before[2]) == 2 * 5
