"""JSON in whatever shape: lines, arrays, pretty-printed, concatenated, wrapped; in any encoding."""
import json

import pytest

from minillm import json_stream
from support.reading import BOMS, Found, read

TEXTS = ["甲\n乙", "丙]}", "丁"]
RECORDS = [{"text": text} for text in TEXTS]
VALUES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
SHAPES = {
    "lines": "\n".join(VALUES),
    "array": json.dumps(RECORDS, ensure_ascii=False),
    "array, pretty": json.dumps(RECORDS, ensure_ascii=False, indent=2),
    "array, a record on a line": "[\n" + ",\n".join(VALUES) + "\n]\n",
    "array after blank lines": "\n\n  [" + ",".join(VALUES) + "]",
    "two arrays": json.dumps(RECORDS[:1]) + "\n" + json.dumps(RECORDS[1:]),
    "lines of arrays": json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:]) + "\n",
    "array of strings": json.dumps(TEXTS),
    "lines of strings": "\n".join(map(json.dumps, TEXTS)),
    "concatenated": "".join(VALUES),
    "concatenated with spaces": " ".join(VALUES),
    "pretty objects": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "lines with commas": ",\n".join(VALUES) + ",\n",
    "wrapped": json.dumps({"data": RECORDS}),
    "wrapped, pretty": json.dumps({"data": RECORDS}, indent=2),
    "wrapped, after another key": json.dumps({"version": 1, "data": RECORDS}),
    "wrapped in two lists": json.dumps({"version": 1, "data": RECORDS[:1], "train": RECORDS[1:]}),
    "a list of the same kind beside a text": "\n".join(json.dumps(
        {**record, "examples": [{"text": "例"}]}, ensure_ascii=False) for record in RECORDS),
    "CRLF": "\r\n".join(VALUES),
}


@pytest.mark.parametrize("encoding", BOMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_encodings(tmp_path, shape, encoding):
    """The encoding is told by --encoding, or by the byte order mark."""
    path, content = tmp_path / "c.json", SHAPES[shape].encode(encoding)

    path.write_bytes(content)
    assert read(path, encoding=encoding) == Found(TEXTS)

    path.write_bytes(BOMS[encoding] + content)
    assert read(path) == Found(TEXTS, {}, {"byte order mark removed": 1})


def dump(value, **options):
    return json.dumps(value, ensure_ascii=False, **options)


MANY = [{"text": f"{number}" + "甲" * 1000} for number in range(500)]
LARGE = {
    "array, pretty": lambda: dump(MANY, indent=1),
    "concatenated": lambda: "".join(dump(record, indent=0) for record in MANY),
    "pretty objects": lambda: "\n".join(dump(record, indent=1) for record in MANY),
    "wrapped": lambda: dump({"data": MANY}),
}


@pytest.mark.parametrize("shape", LARGE)
def test_a_file_may_be_larger_than_a_value_may_be(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(json_stream, "MAX_LINE", 300_000)
    path = tmp_path / "c.json"
    path.write_text(LARGE[shape]())
    assert path.stat().st_size > 300_000

    assert read(path) == Found([record["text"] for record in MANY])


def test_an_array_cut_short(tmp_path):
    (tmp_path / "c.json").write_text(SHAPES["array, pretty"][:-8])
    cost = {"malformed JSON, with all that follows in this file": 1}
    assert read(tmp_path / "c.json") == Found(TEXTS[:2], cost)


@pytest.mark.parametrize("first", ['{"text": "x', "[1, 2", "{", "nonsense", '{"text"'])
def test_a_broken_first_line_spoils_no_other(tmp_path, first):
    (tmp_path / "c.jsonl").write_text(first + "\n" + SHAPES["lines"])
    assert read(tmp_path / "c.jsonl") == Found(TEXTS, {"malformed JSON": 1})
