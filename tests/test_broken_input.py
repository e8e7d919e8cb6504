"""Files of text that break in the middle: what was read stays, and what is lost is said."""
import json

import pytest

from minillm.errors import UserError
from minillm.report import Report
from minillm.text_files import Source
from minillm.text_reader import documents

TEXTS = [f"第{number}篇文章。" for number in range(9)]


def records(spoilt):
    """The texts as JSON records; `spoilt` stands in the place of the fourth."""
    made = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    made[3] = spoilt
    return made


@pytest.mark.parametrize("spoilt", [
    '{"text": oops}', '{"text": "x" "y"}', '{"id": ' + "9" * 5000 + "}", "[" * 2000 + "]" * 2000,
], ids=["no JSON", "two strings", "5,000 digits", "nested too deep"])
def test_a_broken_record_in_an_array_says_what_it_costs(tmp_path, spoilt):
    """Where it ends is not known: the records behind it are lost with it."""
    report = Report()
    (tmp_path / "c.json").write_text("[\n" + ",\n".join(records(spoilt)) + "\n]", encoding="utf-8")

    found = [text for _, text in documents(Source([str(tmp_path / "c.json")], report))]

    assert found == TEXTS[:3]
    assert "skipped 1: malformed JSON, with all that follows in this file" in report.lines()[0]


def test_the_same_record_in_a_line_costs_itself(tmp_path):
    report = Report()
    (tmp_path / "c.jsonl").write_text("\n".join(records('{"text": oops}')), encoding="utf-8")

    found = [text for _, text in documents(Source([str(tmp_path / "c.jsonl")], report))]

    assert found == TEXTS[:3] + TEXTS[4:]


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],                       # cut short
    lambda data: data[:9] + b"\xff" * 16 + data[25:],          # overwritten
    lambda data: data + b"more",                               # something behind it
], ids=["cut short", "overwritten", "longer"])
def test_a_damaged_zst_is_one_line(tmp_path, damage):
    zstd = pytest.importorskip("backports.zstd")
    whole = zstd.compress("\n".join(records('{"text": "甲"}') * 50).encode())
    (tmp_path / "c.jsonl.zst").write_bytes(damage(whole))

    with pytest.raises(UserError, match="c.jsonl.zst is damaged or cut short .*: fetch it again"):
        list(documents(Source([str(tmp_path / "c.jsonl.zst")], Report())))
