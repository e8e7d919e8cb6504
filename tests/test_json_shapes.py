"""JSON in whatever shape: lines, arrays, pretty-printed, concatenated, wrapped; in any encoding."""
import json

import pytest

from minillm import json_stream
from minillm.chat_names import Names
from minillm.errors import UserError
from minillm.report import Report
from minillm.text_files import Source
from minillm.text_reader import conversations, documents
from support.chat_records import said
from support.reading import BOMS, Found, read

TEXTS = ["甲\n乙", "丙]}", "丁"]
RECORDS = [{"text": text} for text in TEXTS]
VALUES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
# a list of the same kind stands before the text
WITH_EXAMPLES = [{"examples": [{"text": "例"}], "id": 1, **record} for record in RECORDS]
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
    "a list of the same kind before a text": "\n".join(map(json.dumps, WITH_EXAMPLES)),
    "a list of the same kind before a text, pretty": "\n".join(
        json.dumps(record, indent=2) for record in WITH_EXAMPLES),
    "a list of the same kind before a text, array": json.dumps(WITH_EXAMPLES),
    "an empty list before a text, pretty": "".join(
        json.dumps({"items": [], **record}, indent=2) for record in RECORDS),
    "lists on lines, the first without a text": "\n".join(
        map(json.dumps, [{"examples": RECORDS[:1]}, *WITH_EXAMPLES[1:]])),
    "wrapped, before another key": json.dumps({"data": RECORDS, "version": "1.0"}, indent=2),
    "wrapped, after what the file is": json.dumps({"name": "甲", "version": "1", "data": RECORDS}),
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


# what is a record itself, though it holds a list of others: (record, --text_key, its text)
ITEMS = [{"text": "签"}, {"text": "标"}]
OWN = [
    ({"body": "文", "items": ITEMS}, "body", "文"),
    ({"items": ITEMS, "body": "文"}, "body", "文"),
    ({"items": ITEMS, "body": "文"}, "title,body", "文"),
    ({"body": "文", "items": ITEMS}, "text", None),
    ({"items": ITEMS, "id": 5, "body": "文"}, "text", None),
    ({"body": None, "items": ITEMS}, "body", None),
]


@pytest.mark.parametrize("record, key, text", OWN)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_a_record_is_not_replaced_by_a_list_in_it(tmp_path, record, key, text, indent, count):
    (tmp_path / "c.json").write_text("\n".join([dump(record, indent=indent)] * count))

    found = read(tmp_path / "c.json", text_key=key)

    assert found.items == [text] * (count if text else 0)
    assert found.skipped == ({} if text else {f"no text under '{key}'": count})


INNER = [{"instruction": "内", "output": "里"}]


@pytest.mark.parametrize("key", ["items", "data", "examples"])
def test_a_pair_is_not_replaced_by_pairs_in_it(tmp_path, key):
    records = [{"q": "问", "a": "答", key: INNER}, {key: INNER, "q": "问", "a": "答"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(dump, records)))

    found = read(tmp_path / "c.jsonl", conversations, names=Names("q:user,a:assistant"))

    assert found.items == [said("u问", "a答")] * 2 and not found.skipped


def test_wrapped_pairs(tmp_path):
    (tmp_path / "c.json").write_text(dump({"data": INNER * 2, "version": "1.0"}))

    assert read(tmp_path / "c.json", conversations) == Found([said("u内", "a里")] * 2)


def about(*keys):
    return dict.fromkeys(keys, "甲")


# {"data": pairs} beside other things: how many conversations, else why there is none
RECORD = [{"instruction": "一", "input": "", "output": "甲"}, {"instruction": "二", "output": "乙"}]
UNCLEAR = "data holds pairs, records or turns (turns: --map=data:messages)"
WRAPPING = [
    ({**about("name", "version", "license", "language"), "data": RECORD}, 2),
    ({"code": 0, "msg": "ok", "total": 2, "page": 1, "data": RECORD}, 2),
    ({"data": RECORD, "info": {"a": 1}, "version": 1.0, "license": "MIT"}, 2),
    ({"title": "题", "data": RECORD}, UNCLEAR),
    ({"id": 1, "data": RECORD}, UNCLEAR),
    ({"topic": "题", "data": [{"question": "一", "answer": "甲"}]}, UNCLEAR),
]


@pytest.mark.parametrize("value, expected", WRAPPING)
def test_pairs_under_data_are_records_or_the_file_is_refused(tmp_path, value, expected):
    """Never one conversation of what may be many: only --map=data:messages says so."""
    (tmp_path / "c.json").write_text(dump(value))

    found = read(tmp_path / "c.json", conversations)
    as_turns = read(tmp_path / "c.json", conversations, names=Names("data:messages"))

    if expected == 2:
        assert found == Found([said("u一", "a甲"), said("u二", "a乙")])
    else:
        assert found.items == [] and found.skipped == {expected: 1}
        assert as_turns.items == [sum((said(f"u{pair.get('instruction', '一')}", f"a{answer}")
                                       for pair, answer in zip(value["data"], "甲乙")), [])]


@pytest.mark.parametrize("value", [
    {"train": RECORDS, "validation": RECORDS[:2], "version": "1.0"},
    {"version": "1.0", "train": RECORDS, "validation": RECORDS[:2], "empty": []}])
@pytest.mark.parametrize("large", [False, True])
def test_lists_beside_a_wrapped_one_are_counted(tmp_path, value, large):
    """Large: it is streamed, and its end not looked at before."""
    record = {"text": "长" * (100_000 if large else 1)}
    value = {key: [record] * 60 if key == "train" else item for key, item in value.items()}
    (tmp_path / "c.json").write_text(dump(value))
    report = Report()

    found = list(documents(Source([str(tmp_path / "c.json")], report)))

    assert len(found) == 60 and not report.skipped
    assert report.left_out == {"validation": 2}


@pytest.mark.parametrize("record", [
    {"from": "人民日报", "title": "题", "text": "文"}, {"speaker": "甲", "text": "文"}])
@pytest.mark.parametrize("wrap", [list, lambda records: {"data": list(records)}])
def test_documents_that_look_like_turns_are_documents(tmp_path, record, wrap):
    (tmp_path / "c.json").write_text(dump(wrap([record] * 3)))

    assert read(tmp_path / "c.json") == Found(["文"] * 3)


def test_a_long_record_before_whose_text_a_list_stands(tmp_path):
    """Longer than what is looked at first."""
    record = {"examples": [{"text": "例" * 50_000}] * 2, "text": "文"}
    (tmp_path / "c.jsonl").write_text(dump(record))

    assert read(tmp_path / "c.jsonl") == Found(["文"])


@pytest.mark.parametrize("rest", ['"x": oops}', '"x": "\t"}'], ids=["oops", "tab"])
def test_a_broken_first_record_with_a_list_spoils_no_other(tmp_path, rest):
    first = '{"examples": [{"text": "例"}], "text": "丙",' + rest
    (tmp_path / "c.jsonl").write_text(first + "\n" + SHAPES["lines"])

    assert read(tmp_path / "c.jsonl").items[-3:] == TEXTS


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


def test_an_array_that_breaks_off_in_utf_8_is_said_to_be_damaged(tmp_path):
    content = SHAPES["array"].encode()[:-1] + b', "' + "天地玄黄宇宙洪荒日月盈昃".encode() * 1000
    (tmp_path / "c.json").write_bytes(content + b"\xff" + b'"]')

    with pytest.raises(UserError, match="not utf-8 throughout: `iconv -c -f utf-8 -t"):
        read(tmp_path / "c.json")


@pytest.mark.parametrize("first", ['{"text": "x', "[1, 2", "{", "nonsense", '{"text"'])
def test_a_broken_first_line_spoils_no_other(tmp_path, first):
    (tmp_path / "c.jsonl").write_text(first + "\n" + SHAPES["lines"])
    assert read(tmp_path / "c.jsonl") == Found(TEXTS, {"malformed JSON": 1})
