"""Flags that make a turn context: of a turn, of a part, of a record; one, or a list of them."""
from typing import NamedTuple

import pytest

from support.chat_records import ANSWER, PAIR, PLAIN, QA, QUESTION, read_record, record, said, turn
from support.reading import Found

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


@pytest.mark.parametrize("pair", [PAIR, {"prompt": [QUESTION], "completion": [ANSWER]}])
def test_a_rejected_answer_is_not_learned(tmp_path, pair):
    assert read_record(tmp_path, {**pair, "label": True}).items == [PLAIN]
    found = read_record(tmp_path, {**pair, "label": False})
    assert found == Found([], {"label is false: a rejected answer": 1})


def test_rival_answers_are_not_one_conversation(tmp_path):
    chain = [turn("prompter", "问", message_id="a", parent_id=None),
             turn("assistant", "答", message_id="b", parent_id="a")]
    assert read_record(tmp_path, record(*chain)).items == [PLAIN]

    rival = turn("assistant", "不", message_id="c", parent_id="a")
    found = read_record(tmp_path, record(*chain, rival))

    assert found == Found([], {"a tree of turns (a parent_id stands twice)": 1})
