"""Conversations that are not clean: what is repaired, left out, skipped.

Each is counted, and printed with the place of the first.
"""
import collections
import json
from typing import NamedTuple

import pytest

from minillm.report import Report
from minillm.text_files import Source
from minillm.text_reader import conversations
from support.chat_records import (ANSWER, PAIR, PLAIN, QA, QUESTION, read_record, record, said,
                                  turn)
from support.preparation_runs import texts, write_lines
from support.reading import Found


class Case(NamedTuple):
    name: str
    record: object                   # as JSON
    messages: list | None            # None: skipped
    skipped: tuple = ()
    repaired: tuple = ()
    left_out: tuple = ()


NO_ANSWER = ("no assistant turn",)
NO_OBJECT = 'a turn is no object such as {"role": "user", "content": "…"}'
CASES = [
    # empty turns
    Case("empty question", record(turn("user", ""), ANSWER), None,
         skipped=NO_ANSWER, repaired=("cut before an empty turn",)),
    Case("blank answer", record(QUESTION, turn("assistant", " \n")), None,
         skipped=NO_ANSWER, repaired=("cut before an empty turn",)),
    Case("a pair without an answer", {"instruction": "问", "output": ""}, None,
         skipped=NO_ANSWER, repaired=("cut before an empty turn",)),
    Case("a pair without a question", {"output": "独白"}, None,
         skipped=NO_ANSWER, repaired=("cut before an empty turn",)),
    Case("a pair with an empty question", {"instruction": " ", "input": "", "output": "答"}, None,
         skipped=NO_ANSWER, repaired=("cut before an empty turn",)),
    Case("two different answers", {"question": "问", "response": "答", "answer": "5"}, PLAIN,
         left_out=("answer",)),
    Case("the same answer twice", {"question": "问", "response": "答", "answer": "答"}, PLAIN),
    Case("empty answer later", record(*QA, turn("user", "又"), turn("assistant", ""), *QA), PLAIN,
         repaired=("cut before an empty turn", "user turn without an answer dropped")),
    Case("null later", record(*QA, turn("user", None), ANSWER), PLAIN,
         repaired=("cut before an empty turn",)),
    Case("empty system turn", record(turn("system", ""), *QA), PLAIN,
         repaired=("empty system turn dropped",)),
    Case("blank system turn", record(turn("system", " \n"), *QA), PLAIN,
         repaired=("empty system turn dropped",)),
    Case("system turn null", record(turn("system", None), *QA), PLAIN,
         repaired=("empty system turn dropped",)),
    Case("system turn of no parts", record(turn("system", []), *QA), PLAIN,
         repaired=("empty system turn dropped",)),
    Case("empty first assistant turn", record(turn("assistant", ""), *QA), PLAIN,
         repaired=("empty first assistant turn dropped",)),
    Case("empty system and first assistant turns",
         record(turn("system", None), turn("assistant", " "), *QA), PLAIN,
         repaired=("empty system turn dropped", "empty first assistant turn dropped")),

    # turns out of order
    Case("a system that answers", record(turn("usr", "问"), turn("sys", "答")), None,
         skipped=("no assistant turn; if system answers: --map=NAME:assistant",),
         repaired=("cut before a later system turn",)),
    Case("pairs with sorted keys",
         record({"assistant": "甲", "user": "一"}, {"answer": "乙", "question": "二"}),
         said("u一", "a甲", "u二", "a乙")),
    Case("input before instruction", record({"input": "子", "instruction": "译", "output": "s"}),
         said("u译\n子", "as")),
    Case("pairs with an empty input", record({"instruction": "一", "input": "", "output": "甲"},
                                             {"instruction": "二", "input": "", "output": "乙"}),
         said("u一", "a甲", "u二", "a乙")),
    Case("a history of pairs with an empty input",
         {**PAIR, "history": [{"instruction": "一", "input": "", "output": "甲"}]},
         said("u一", "a甲", "u问", "a答")),
    Case("a history that begins with a greeting", {**PAIR, "history": [[None, "你好"], ["一", "甲"]]},
         said("u一", "a甲", "u问", "a答"), repaired=("assistant turn before any user turn dropped",)),
    Case("a history with an empty question later", {**PAIR, "history": [["一", "甲"], [None, "乙"]]},
         said("u一", "a甲"), repaired=("cut before an empty turn",)),
    Case("history with sorted keys", {**PAIR, "history": [{"answer": "甲", "question": "一"}]},
         said("u一", "a甲", "u问", "a答")),
    Case("two user turns running", record(turn("user", "一"), turn("user", "二"), ANSWER),
         said("u一\n二", "a答"), repaired=("two user turns running joined",)),
    Case("two assistant turns running", record(*QA, turn("assistant", "再")),
         said("u问", "a答\n再"), repaired=("two assistant turns running joined",)),
    Case("two system turns", record(turn("system", "甲"), turn("system", "乙"), *QA),
         said("s甲\n乙", "u问", "a答"), repaired=("two system turns running joined",)),
    Case("system beside a system turn", record(turn("system", "美"), *QA, system="善"),
         said("s善\n美", "u问", "a答"), repaired=("two system turns running joined",)),
    Case("a later system turn", record(*QA, turn("system", "善"), *QA), PLAIN,
         repaired=("cut before a later system turn",)),
    Case("assistant first", record(turn("assistant", "你好"), *QA), PLAIN,
         repaired=("assistant turn before any user turn dropped",)),
    Case("assistant first, after system",
         record(turn("system", "善"), turn("assistant", "你好"), *QA), said("s善", "u问", "a答"),
         repaired=("assistant turn before any user turn dropped",)),
    Case("assistant alone", record(turn("assistant", "你好")), None,
         skipped=NO_ANSWER, repaired=("assistant turn before any user turn dropped",)),
    Case("user last", record(*QA, turn("user", "又")), PLAIN,
         repaired=("user turn without an answer dropped",)),
    Case("user alone", record(QUESTION), None, skipped=NO_ANSWER),

    Case("a prompt with an answer",
         {"prompt": [*QA, turn("user", "二")], "completion": [turn("assistant", "乙")]},
         said("u问", "-答", "u二", "a乙"), left_out=("answers of a prompt (context, not learned)",)),
    Case("a completion without an answer", {"prompt": [QUESTION], "completion": [QUESTION]}, None,
         skipped=NO_ANSWER, repaired=("two user turns running joined",)),

    # unknown roles, values, forms
    Case("texts without roles, odd", {"id": 1, "data": ["早", "问", "答"]}, None,
         skipped=("an odd number of texts without roles",)),
    Case("a text without a role", {"id": 1, "data": ["独白"]}, None,
         skipped=("an odd number of texts without roles",)),
    Case("texts without roles, one empty", {"id": 1, "data": ["问", "答", "又", ""]}, PLAIN,
         repaired=("cut before an empty turn", "user turn without an answer dropped")),
    Case("texts without roles beside a pair", {**PAIR, "data": ["一", "甲"]}, PLAIN,
         left_out=("data",)),
    Case("texts without roles, one a number", {"id": 1, "data": ["问", 5]}, None,
         skipped=("no conversation",)),
    Case("texts under messages", {"messages": ["问", "答"]}, None,
         skipped=(NO_OBJECT,)),
    Case("turns and a text", {"prompt": [QUESTION], "completion": "答"}, None,
         skipped=("a turn is not text",)),
    Case("turns and another question",
         {"prompt": [QUESTION], "question": "问", "completion": [ANSWER]}, None,
         skipped=("a turn is not text",)),
    Case("unknown role", record(*QA, turn("narrator", "x")), None, skipped=("unknown role",)),
    Case("null role", record(turn(None, "问"), ANSWER), None,
         skipped=("a turn without a role",)),
    Case("no role", {"messages": [{"message": "问"}, {"message": "答"}]}, None,
         skipped=("a turn without a role",)),
    Case("role in a list", record(turn(["human"], "x")), None, skipped=("unknown role",)),
    Case("a number for a text", record(turn("user", 5), ANSWER), None,
         skipped=("a turn is not text",)),
    Case("a list of numbers", record(turn("user", [5]), ANSWER), None,
         skipped=("a turn is not text",)),
    Case("input a number", {**PAIR, "input": 5}, None, skipped=("a turn is not text",)),
    Case("a turn null", {"conversations": [None]}, None, skipped=(NO_OBJECT,)),
    Case("turns null", {"conversations": None}, None, skipped=("no turns",)),
    Case("no turns", {"conversations": []}, None, skipped=("no turns",)),
    Case("turns as text", {"conversations": "问答"}, None, skipped=("no conversation",)),
    Case("nothing known", {"q": "问", "a": "答"}, None, skipped=("no conversation",)),
    Case("several answers", {"question": "问", "answer": ["甲", "乙"]}, None,
         skipped=("several answers",)),
    Case("history that is no list", {**PAIR, "history": "早先"}, None,
         skipped=("history is not a list",)),
    Case("lone surrogate", record(turn("user", "a\ud800"), ANSWER), said("ua\ufffd", "a答"),
         repaired=("lone surrogate replaced by U+FFFD",)),

    # tools
    Case("a tool's turn", record(*QA, turn("tool", "x"), turn("assistant", "丙")), PLAIN,
         repaired=("cut before a tool turn",)),
    Case("ShareGPT's tools", record(*QA, turn("observation", "x")), PLAIN,
         repaired=("cut before a tool turn",)),
    Case("a call without words",
         record(*QA, turn("user", "二"), turn("assistant", None, tool_calls=[{}]),
                turn("tool", "x"), turn("assistant", "丙")),
         PLAIN, left_out=("tool_calls",),
         repaired=("cut before a tool turn", "user turn without an answer dropped")),
    Case("a call beside words", record(QUESTION, {**ANSWER, "tool_calls": [{"type": "function"}]}),
         PLAIN, left_out=("tool_calls",)),
    Case("tools of a record", record(*QA, tools=[{"type": "function"}]), PLAIN,
         left_out=("tools",)),

    # what has no place in a text
    Case("reasoning_content", record(QUESTION, {**ANSWER, "reasoning_content": "想"}), PLAIN,
         left_out=("reasoning_content",)),
    Case("thinking", record(QUESTION, {**ANSWER, "thinking": "想"}), PLAIN,
         left_out=("thinking",)),
    Case("reasoning", record(QUESTION, {**ANSWER, "reasoning": "想"}), PLAIN,
         left_out=("reasoning",)),
    Case("an image",
         record(turn("user", [{"type": "image_url", "image_url": "x"},
                              {"type": "text", "text": "问"}]), ANSWER),
         PLAIN, left_out=("image_url",)),
    Case("a passage beside a question", {"text": "文", "question": "问", "answer": "答"}, PLAIN,
         left_out=("text",)),
    Case("a message beside a pair", {**PAIR, "message": "文", "content": ["文"]}, PLAIN,
         left_out=("content", "message")),
    Case("value and text", record({"from": "user", "value": "问", "text": "文"}, ANSWER), PLAIN,
         left_out=("text",)),
    Case("two system prompts", {**PAIR, "system": "善", "system_prompt": "美"},
         said("s善", "u问", "a答"), left_out=("system_prompt",)),
    Case("two lists of turns", record(*QA, conversation=[QUESTION]), PLAIN,
         left_out=("conversation",)),
    Case("an answer in parts beside another", {**PAIR, "response": ["乙"]}, PLAIN,
         left_out=("response",)),
    Case("an input that the turns do not hold", record(*QA, input="别的"), PLAIN,
         left_out=("input",)),

    # weights
    Case("weight of a half", record(QUESTION, {**ANSWER, "weight": 0.5}), PLAIN,
         left_out=("weight other than 0 and 1 (taken as 1)",)),
    Case("joined with a turn of weight 0", record(*QA, turn("assistant", "坏", weight=0), *QA),
         said("u问", "-答\n坏", "u问", "a答"),
         repaired=("two assistant turns running joined",
                   "joined with a turn of weight 0: not learned")),
    Case("all turns with weight 0", record(QUESTION, {**ANSWER, "weight": 0}), None,
         skipped=("no turn to learn: all have weight 0",)),
    Case("a record with weight 0", record(*QA, weight=0), None,
         skipped=("no turn to learn: all have weight 0",)),
    Case("a pair with train false", {**PAIR, "train": False}, None,
         skipped=("no turn to learn: all have weight 0",)),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_rule(tmp_path, case):
    items = [] if case.messages is None else [case.messages]

    found = read_record(tmp_path, case.record)

    once = [dict.fromkeys(reasons, 1) for reasons in (case.skipped, case.repaired, case.left_out)]
    assert found == Found(items, *once)


def test_every_rule_is_counted_and_printed(small_corpus, tmp_path):
    """All cases in one file: the report is their sum, on the terminal and in meta.json."""
    path = tmp_path / "all.jsonl"
    records = [case.record for case in CASES]
    records += [{"instruction": text, "output": text} for text in texts(30)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    output, made = small_corpus.sft(tmp_path / "s", files=[path], block_size=1000)

    total = {verb: collections.Counter() for verb in ("skipped", "repaired", "left_out")}
    for case in CASES:
        for verb, counter in total.items():
            counter.update(getattr(case, verb))
    lines = output.splitlines()
    for verb in ("skipped", "repaired"):
        assert {reason: entry["count"] for reason, entry in made[verb].items()} == total[verb]
        for reason, entry in made[verb].items():
            assert f"  {verb} {entry['count']:,}: {reason} (first: {entry['first']})" in lines
            assert entry["first"].startswith(f"{path}:")
    assert made["left_out"] == total["left_out"]
    for key, count in made["left_out"].items():
        assert f"  left out: {key} in {count} record{'' if count == 1 else 's'}" in lines


def test_unknown_keys_are_named_once(small_corpus, tmp_path):
    """On the terminal; of those that 1% of the records or fewer have, how many there are."""
    records = []
    for number in range(300):
        records.append(record(QUESTION, turn("assistant", f"答{number}"), mood="好", id=number))
    records[5]["rare"] = 1
    records[6]["messages"][1]["scarce"] = 2
    records[7]["messages"][1]["scarce"] = 2
    path = write_lines(tmp_path / "c.jsonl", records)

    output, made = small_corpus.sft(tmp_path / "s", files=[path])

    said = "  not used, because no rule knows these keys: mood, 2 rarer ones such as scarce"
    assert said in output.splitlines()
    assert made["unknown_keys"] == {"mood": 300, "scarce": 2, "rare": 1}
    assert made["left_out"] == {} and made["version"] == 2


def test_unknown_roles_are_named(small_corpus, tmp_path):
    """On the terminal the most frequent, and how many others there are."""
    records = [record(QUESTION, turn("assistant", text)) for text in texts(30)]
    records += [record(turn("Narrator ", "x"), *QA)] * 2
    records += [record(*QA, {"from": f"actor\n{number}", "value": "x"}) for number in range(9)]
    path = write_lines(tmp_path / "c.jsonl", records)

    output, made = small_corpus.sft(tmp_path / "s", files=[path])

    actors = "".join(f"actor {number} in 1 record, " for number in range(7))
    said = (f"  roles that no rule knows: Narrator in 2 records, {actors}2 others; "
            "--map=NAME:user (or assistant, system, tool) says what one is")
    assert said in output.splitlines()
    assert made["unknown_roles"]["Narrator"] == 2 and len(made["unknown_roles"]) == 10
    assert made["skipped"]["unknown role"]["count"] == 11


def test_rare_unknown_keys_are_counted_even_where_none_is_frequent():
    report = Report()
    report.records = 1000
    report.unknown.update(f"key{number}" for number in range(200))

    [line] = report.lines()

    assert line.endswith("these keys: 200 rarer ones such as key0")
    assert len(report.summary()["unknown_keys"]) == 100


UNKNOWN = [
    ({**PAIR, "context": "文"}, ["context"]),
    (record({"human": "问", "assistant": "答", "knowledge": "文"}), ["knowledge"]),
    ({**PAIR, "history": [{"prompt": "一", "response": "甲", "passage": "文"}]}, ["passage"]),
    ({**PAIR, "history": [turn("user", "一", mood="好"), turn("assistant", "甲")]}, ["mood"]),
    (record(turn("user", [{"type": "text", "text": "问", "quote": "文"}]), ANSWER), ["quote"]),
    (record(QUESTION, {**ANSWER, "Facts": ["文"]}, about={"a": 1}), ["Facts", "about"]),
]


@pytest.mark.parametrize("other, keys", UNKNOWN, ids=[str(keys) for _, keys in UNKNOWN])
def test_unknown_keys_are_counted_wherever_they_stand(tmp_path, other, keys):
    report = Report()
    path = write_lines(tmp_path / "c.jsonl", [other] * 2)

    found = list(conversations(Source([path], report)))

    assert len(found) == 2
    assert report.unknown == dict.fromkeys(keys, 2) and not report.left_out
