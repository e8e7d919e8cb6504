"""Conversations that are not clean: what is repaired, left out, skipped; what is not supervised.

Each is counted, and printed with the place of the first.
"""
import collections
import json
from typing import NamedTuple

import pytest

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
    Case("pairs with sorted keys",
         record({"assistant": "甲", "user": "一"}, {"answer": "乙", "question": "二"}),
         said("u一", "a甲", "u二", "a乙")),
    Case("input before instruction", record({"input": "子", "instruction": "译", "output": "s"}),
         said("u译\n子", "as"), repaired=("two user turns running joined",)),
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

    # unknown roles, values, forms
    Case("unknown role", record(*QA, turn("narrator", "x")), None, skipped=("unknown role",)),
    Case("null role", record(turn(None, "问"), ANSWER), None, skipped=("unknown role",)),
    Case("role in a list", record(turn(["human"], "x")), None, skipped=("unknown role",)),
    Case("a number for a text", record(turn("user", 5), ANSWER), None,
         skipped=("a turn is not text",)),
    Case("a list of numbers", record(turn("user", [5]), ANSWER), None,
         skipped=("a turn is not text",)),
    Case("input a number", {**PAIR, "input": 5}, None, skipped=("a turn is not text",)),
    Case("a turn null", {"conversations": [None]}, None, skipped=("a turn is not an object",)),
    Case("turns null", {"conversations": None}, None, skipped=("no conversation",)),
    Case("no turns", {"conversations": []}, None, skipped=("no conversation",)),
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
    """But not one that 1% of the records or fewer have."""
    records = []
    for number in range(300):
        records.append(record(QUESTION, turn("assistant", f"答{number}"), mood="好", id=number))
    records[5]["rare"] = 1
    path = write_lines(tmp_path / "c.jsonl", records)

    output, made = small_corpus.sft(tmp_path / "s", files=[path])

    assert output.count("mood") == 1 and "rare" not in output
    assert made["unknown_keys"] == ["mood"] and made["left_out"] == {} and made["version"] == 2


# ---- flags

CONTEXT = [
    ("weight", 0),
    ("weight", 0.0),
    ("weight", "0"),
    ("train", False),
    ("loss", False),
    ("loss", "false"),
    ("trainable", False),
    ("loss_mask", 0),
    ("loss_weight", 0),
]
SUPERVISED = [
    ("weight", 1),
    ("weight", None),
    ("train", True),
    ("loss", "true"),
]


@pytest.mark.parametrize("key, value", CONTEXT)
def test_a_flag_makes_a_turn_context(tmp_path, key, value):
    bad, good = turn("assistant", "坏", **{key: value}), turn("assistant", "好")

    found = read_record(tmp_path, record(QUESTION, bad, turn("user", "二"), good))

    assert found == Found([said("u问", "-坏", "u二", "a好")])


@pytest.mark.parametrize("key, value", SUPERVISED)
def test_a_flag_leaves_a_turn_supervised(tmp_path, key, value):
    found = read_record(tmp_path, record(QUESTION, {**ANSWER, key: value}))
    assert found == Found([PLAIN])


def test_a_flag_of_a_part_is_that_of_the_turn(tmp_path):
    bad = turn("assistant", [{"type": "text", "text": "坏", "weight": 0}])
    found = read_record(tmp_path, record(QUESTION, bad, *QA))
    assert found == Found([said("u问", "-坏", "u问", "a答")])


class FlagList(NamedTuple):
    name: str
    record: dict                     # its turns are answered by 甲, 乙 …
    messages: list | None            # None: skipped


TWO = (QUESTION, turn("assistant", "甲"), QUESTION, turn("assistant", "乙"))
HISTORY = {"history": [["问", "甲"]], "instruction": "问", "output": "乙"}
SECOND = said("u问", "-甲", "u问", "a乙")
FLAG_LISTS = [
    FlagList("a turn each", record(*TWO, loss_mask=[0, 0, 0, 1]), SECOND),
    FlagList("an answer each", record(*TWO, loss_mask=[0, 1]), SECOND),
    FlagList("an answer each, as words", record(*TWO, train=[False, True]), SECOND),
    FlagList("as text of JSON", record(*TWO, loss="[0, 1]"), SECOND),
    FlagList("an answer each of pairs", {"conversation": [{"human": "问", "assistant": "甲"},
                                                          {"human": "问", "assistant": "乙"}],
                                         "weight": [0, 1]}, SECOND),
    FlagList("a system prompt beside, counted",
             record(*TWO, system="善", loss_mask=[0, 0, 0, 0, 1]), [*said("s善"), *SECOND]),
    FlagList("a system prompt beside, not counted",
             record(*TWO, system="善", loss_mask=[0, 0, 0, 1]), [*said("s善"), *SECOND]),
    FlagList("a system turn", record(turn("system", "善"), *TWO, loss_mask=[0, 0, 0, 0, 1]),
             [*said("s善"), *SECOND]),
    FlagList("a history, counted", {**HISTORY, "loss_mask": [0, 0, 0, 1]}, SECOND),
    FlagList("a history and a system prompt, counted",
             {**HISTORY, "system": "善", "loss_mask": [0, 0, 0, 0, 1]}, [*said("s善"), *SECOND]),
    FlagList("an empty list", record(*TWO, loss_mask=[]), said("u问", "a甲", "u问", "a乙")),

    FlagList("too short", record(*TWO, loss_mask=[0]), None),
    FlagList("too long", record(*TWO, loss_mask=[0, 0, 0, 1, 1]), None),
    FlagList("a system turn, not counted",
             record(turn("system", "善"), *TWO, loss_mask=[0, 0, 0, 1]), None),
    FlagList("perhaps without the history", {**HISTORY, "loss_mask": [0, 1]}, None),
    FlagList("one of two lists", record(*TWO, loss_mask=[0, 1], train=[1, 1, 1]), None),
]


@pytest.mark.parametrize("case", FLAG_LISTS, ids=[case.name for case in FLAG_LISTS])
def test_a_list_of_flags(tmp_path, case):
    found = read_record(tmp_path, case.record)

    if case.messages is None:
        [reason] = found.skipped
        assert "has neither a flag for each turn nor one for each answer" in reason
        assert found == Found([], {reason: 1})
    else:
        assert found == Found([case.messages])


def test_a_list_of_flags_of_one_turn_is_not_understood(tmp_path):
    found = read_record(tmp_path, record(QUESTION, {**ANSWER, "loss_mask": [0, 1]}))
    assert found == Found([], {"loss_mask of a turn is a list": 1})


def test_a_flag_of_a_record_is_that_of_its_history_too(tmp_path):
    found = read_record(tmp_path, {**HISTORY, "train": False})
    assert found == Found([], {"no turn to learn: all have weight 0": 1})
