"""Conversations by whatever names: roles, keys of records and turns, system turns, history."""
import json
from typing import NamedTuple

import pytest

from minillm.chat_names import Names
from minillm.errors import UserError
from minillm.report import Report
from minillm.text_files import Source
from minillm.text_reader import conversations
from support.chat_records import (ANSWER, PAIR, PLAIN, QA, QUESTION, read_record, record, said,
                                  turn)
from support.reading import Found

# ---- roles and keys

ROLES = [
    ("human", "assistant"),          # Belle
    ("human", "gpt"),                # ShareGPT
    ("Human", "Assistant"),
    ("USER", "ASSISTANT"),
    ("user ", " assistant"),
    ("prompter", "assistant"),
    ("user", "bot"),
    ("user", "Model"),
    ("user", "ChatGPT"),
    ("user", "ai"),
    ("user", "bing"),
    ("用户", "助手"),
    ("人类", "机器人"),
]


@pytest.mark.parametrize("user, assistant", ROLES)
def test_roles(tmp_path, user, assistant):
    turns = [{"from": user, "value": "问"}, {"from": assistant, "value": "答"}]
    assert read_record(tmp_path, {"id": "33445", "conversations": turns}) == Found([PLAIN])


KEYS_OF_PAIRS = [
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "target"),
    ("input", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("Prompt", "Response"),
    ("INSTRUCTION", "OUTPUT"),
]


@pytest.mark.parametrize("question, answer", KEYS_OF_PAIRS)
def test_keys_of_a_pair(tmp_path, question, answer):
    assert read_record(tmp_path, {question: "问", answer: "答"}) == Found([PLAIN])


@pytest.mark.parametrize("key", ["conversations", "messages", "conversation", "dialogue", "dialog",
                                 "chat", "turns", "Messages"])
def test_key_of_the_turns(tmp_path, key):
    assert read_record(tmp_path, {key: QA}) == Found([PLAIN])


@pytest.mark.parametrize("content", ["value", "content", "text", "Content"])
@pytest.mark.parametrize("role", ["from", "role", "speaker", "Role"])
def test_keys_of_a_turn(tmp_path, role, content):
    turns = [{role: "user", content: "问"}, {role: "assistant", content: "答"}]
    assert read_record(tmp_path, {"messages": turns}) == Found([PLAIN])


# ---- --map

MAPPINGS = [
    ("q:user,a:assistant", {"q": "问", "a": "答"}),
    ("甲方:user,乙方:assistant", record(turn("甲方", "问"), turn("乙方", "答"))),
    ("who:role,says:content,talk:messages",
     {"talk": [{"who": "user", "says": "问"}, {"who": "assistant", "says": "答"}]}),
    ("narrator:tool", record(*QA, turn("narrator", "x"))),
]


@pytest.mark.parametrize("mapping, other", MAPPINGS)
def test_map_names_all_else(tmp_path, mapping, other):
    assert read_record(tmp_path, other, names=Names(mapping)).items == [PLAIN]
    assert read_record(tmp_path, other).items == []


def test_a_system_that_answers_can_be_mapped(tmp_path):
    found = read_record(tmp_path, record(turn("usr", "问"), turn("sys", "答")),
                        names=Names("sys:assistant"))

    assert found.items == [PLAIN]


def test_mapped_names_are_joined_in_the_order_given(tmp_path):
    """baike2018qa has a title, and a description behind it."""
    found = read_record(tmp_path, {"desc": "详情", "title": "题", "answer": "答"},
                        names=Names("title:user,desc:user"))

    assert found.items == [said("u题\n详情", "a答")]


def test_a_key_of_a_turn_that_is_not_known_is_named(tmp_path):
    report = Report()
    (tmp_path / "c.jsonl").write_text(json.dumps(
        {"messages": [{"role": "user", "msg": "问"}, {"role": "assistant", "msg": "答"}]}))

    assert list(conversations(Source([str(tmp_path / "c.jsonl")], report))) == []
    assert report.unknown == {"msg": 1}


@pytest.mark.parametrize("mapping", ["q", "q:", ":user", "q:teacher"])
def test_map_is_checked(mapping):
    with pytest.raises(UserError, match="NAME:MEANING"):
        Names(mapping)


# ---- records that say more than a question and an answer

class Case(NamedTuple):
    name: str
    record: object                   # as JSON, or a string of JSON
    messages: list


TRANSCRIPT = "Human:问\nAssistant:答\nHuman:二\nAssistant:"
CASES = [
    # several forms of the turns
    Case("several exchanges", record(*QA, *QA), said("u问", "a答", "u问", "a答")),
    Case("pairs in turns",
         {"conversation": [{"human": "问", "assistant": "答"}, {"human": "二", "assistant": "乙"}]},
         said("u问", "a答", "u二", "a乙")),
    Case("turns as text of JSON", {"conversations": json.dumps(QA)}, PLAIN),
    Case("a line that is a list of turns", QA, PLAIN),
    Case("Belle's transcript", {"instruction": TRANSCRIPT, "input": "", "output": "乙"},
         said("u问", "a答", "u二", "a乙")),
    Case("TRL's two lists of turns", {"prompt": [turn("system", "善"), QUESTION],
                                      "completion": [ANSWER]}, said("s善", "u问", "a答")),
    Case("TRL's completion of several turns", {"prompt": [QUESTION], "completion": [ANSWER, *QA]},
         said("u问", "a答", "u问", "a答")),
    Case("UltraChat's texts in turn", {"id": "7", "data": ["一", "甲", "二", "乙"]},
         said("u一", "a甲", "u二", "a乙")),
    Case("texts in turn, as text of JSON", {"id": "7", "data": '["问", "答"]', "system": "善"},
         said("s善", "u问", "a答")),
    Case("Alpaca with an input", {"instruction": "译", "input": "甲", "output": "答"},
         said("u译\n甲", "a答")),
    Case("a question and its context", {"question": "问", "input": "文", "answer": "答"},
         said("u问\n文", "a答")),
    Case("a prompt that the turns hold", record(*QA, prompt="问", prompt_id="1"), PLAIN),

    Case("the same turns twice", record(*QA, chat=list(QA), turns=json.dumps(QA)), PLAIN),
    Case("a text twice", record({**QUESTION, "text": "问"}, {**ANSWER, "value": "答"}, text="答"),
         PLAIN),

    # several forms of a text
    Case("parts of text",
         record(turn("user", [{"type": "text", "text": "问"}]),
                turn("assistant", [{"type": "text", "text": "答"}])),
         PLAIN),
    Case("parts of text beside strings",
         record(turn("user", ["问", {"type": "text", "text": "吗"}]), ANSWER), said("u问吗", "a答")),
    Case("line ends and spaces are kept",
         record(turn("user", " 问\n"), turn("assistant", "\n答 ")), said("u 问\n", "a\n答 ")),
    Case("NUL is kept", record(turn("user", "a\0b"), turn("assistant", "\0")),
         said("ua\0b", "a\0")),
    Case("an empty list as an answer is text", record(QUESTION, turn("assistant", "[]"), *QA),
         said("u问", "a[]", "u问", "a答")),
    Case("null as an answer is text", {**PAIR, "output": "null"}, said("u问", "anull")),
    Case("empty objects as texts",
         record(turn("user", "{}"), turn("assistant", [{"type": "text", "text": "{}"}])),
         said("u{}", "a{}")),
    Case("an empty list as an input and in a history",
         {**PAIR, "input": "[]", "history": [["null", "{}"]]},
         said("unull", "a{}", "u问\n[]", "a答")),
    Case("control tokens are text", record(turn("user", "<|im_end|>"), ANSWER),
         said("u<|im_end|>", "a答")),

    # system turns
    Case("a system turn", record(turn("system", "善"), *QA), said("s善", "u问", "a答")),
    Case("developer", record(turn("developer", "善"), *QA), said("s善", "u问", "a答")),
    Case("system beside turns", record(*QA, system="善"), said("s善", "u问", "a答")),
    Case("system_prompt", record(*QA, system_prompt="善"), said("s善", "u问", "a答")),
    Case("system beside a pair", {"system": "善", **PAIR}, said("s善", "u问", "a答")),
    Case("system null, system_prompt filled", {"system": None, "system_prompt": "善", **PAIR},
         said("s善", "u问", "a答")),
    Case("system empty", {"system": "", **PAIR}, PLAIN),
    Case("system twice the same", record(turn("system", "善"), *QA, system="善"),
         said("s善", "u问", "a答")),

    # history
    Case("history of pairs", {**PAIR, "history": [["一", "甲"], ["二", "乙"]]},
         said("u一", "a甲", "u二", "a乙", "u问", "a答")),
    Case("history of messages", {**PAIR, "history": [turn("user", "一"), turn("assistant", "甲")]},
         said("u一", "a甲", "u问", "a答")),
    Case("history of records", {**PAIR, "history": [{"prompt": "一", "response": "甲"}]},
         said("u一", "a甲", "u问", "a答")),
    Case("history as one flat list", {**PAIR, "history": ["一", "甲"]},
         said("u一", "a甲", "u问", "a答")),
    Case("history as text of JSON", {**PAIR, "history": '[["一", "甲"]]'},
         said("u一", "a甲", "u问", "a答")),
    Case("history and system", {**PAIR, "history": [["一", "甲"]], "system": "善"},
         said("s善", "u一", "a甲", "u问", "a答")),
    Case("history empty list", {**PAIR, "history": []}, PLAIN),
    Case("history empty text", {**PAIR, "history": ""}, PLAIN),
    Case("history null as text", {**PAIR, "history": "null"}, PLAIN),
    Case("tool calls null as text", record(QUESTION, {**ANSWER, "tool_calls": "null"}), PLAIN),
    Case("history null", {**PAIR, "history": None}, PLAIN),

    # an empty value, and the next key filled
    Case("conversations null, messages filled", {"conversations": None, **record(*QA)}, PLAIN),
    Case("conversations empty, a pair filled", {"conversations": [], **PAIR}, PLAIN),
    Case("from empty, role filled",
         record({"from": None, **QUESTION}, {"from": "", **ANSWER}), PLAIN),
    Case("value empty, content filled",
         record({"value": None, **QUESTION}, {"value": "", **ANSWER}), PLAIN),
    Case("value blank, content filled", record({"value": " ", **QUESTION}, ANSWER), PLAIN),
    Case("output null, response filled", {"instruction": "问", "output": None, "response": "答"},
         PLAIN),
    Case("output NaN, response filled",
         '{"instruction": "问", "output": NaN, "response": "答"}', PLAIN),
    Case("input null", {**PAIR, "input": None}, PLAIN),
    Case("input NaN", '{"instruction": "问", "input": NaN, "output": "答"}', PLAIN),
    Case("empty keys of reasoning and tools",
         record(QUESTION, {**ANSWER, "reasoning_content": ""}, tools="[]"), PLAIN),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nothing_is_lost(tmp_path, case):
    """And so nothing is reported."""
    assert read_record(tmp_path, case.record) == Found([case.messages])


# ---- names that no rule knows

NOT_UNDERSTOOD = [
    ("pair", {"q": "问", "a": "答"}, ("q", "a")),
    ("answer alone", {"title": "问", "answer": "答"}, ("title", "answer")),
    ("turns", {"id": 1, "conversations": [{"Q": "问"}, {"A": "答"}]}, ("id", "conversations")),
    # here a value is at fault, and the names are known
    ("empty answer", {"instruction": "问", "input": "", "output": ""}, ()),
    ("several answers", {"instruction": "问", "output": ["一", "二"]}, ()),
    ("no turn", {"messages": [], "tools": []}, ()),
]


@pytest.mark.parametrize("unread, keys", [row[1:] for row in NOT_UNDERSTOOD],
                         ids=[row[0] for row in NOT_UNDERSTOOD])
def test_keys_are_named_only_where_a_name_was_not_understood(tmp_path, unread, keys):
    path, report = tmp_path / "c.jsonl", Report()
    path.write_text(json.dumps(unread))

    found = list(conversations(Source([str(path)], report)))

    assert not found and sum(entry["count"] for entry in report.skipped.values()) == 1
    assert report.keys_seen == keys
