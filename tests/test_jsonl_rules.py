"""JSON lines as real corpora have them, and worse: what is kept, repaired and skipped.

Each is counted, and printed with the place of the first.
"""
import collections
import json
from typing import NamedTuple

import pytest

from minillm import text_files
from support.preparation_runs import (meta, peak_memory, read_documents, refused, text_line, texts,
                                      write_lines)
from support.reading import Found, compress, places, read

A, B = text_line("甲乙"), text_line("丙丁")
BOM = b"\xef\xbb\xbf"


class Case(NamedTuple):
    name: str
    content: bytes                   # of the file
    documents: list
    skipped: dict = {}               # {reason: count}
    repaired: dict = {}


CASES = [
    Case("seq-monkey", b'{"text": "\xe7\x94\xb2\xe4\xb9\x99"}\n' + B, ["甲乙", "丙丁"]),
    Case("escapes", b'{"text": "\\u7532\\n\\t\\"\\\\"}\n', ['甲\n\t"\\']),
    Case("other keys", b'{"id": 1, "text": "a", "meta": {"x": null}}\n', ["a"]),
    Case("surrounding space is text", text_line("  甲\n"), ["  甲\n"]),
    Case("a string is a text", A + b'"x"\n["y", "z"]\n', ["甲乙", "x", "y", "z"]),
    Case("two objects on a line", A[:-1] + B + A, ["甲乙", "丙丁", "甲乙"]),
    Case("control tokens as text", text_line("<|im_start|>user<|endoftext|>"),
         ["<|im_start|>user<|endoftext|>"]),

    # where a file or a line ends
    Case("empty file", b"", []),
    Case("no line end at the end", A + B[:-1], ["甲乙", "丙丁"]),
    Case("last line truncated", A + B[:-6], ["甲乙"], {"malformed JSON": 1}),
    Case("last line truncated inside a character", A + B[:-5], ["甲乙"], {"not utf-8": 1}),
    Case("half a line", A + b'{"text": "x\n' + B, ["甲乙", "丙丁"], {"malformed JSON": 1}),
    Case("blank lines", A + b"\n  \r\n" + B, ["甲乙", "丙丁"], {"blank line": 2}),
    Case("CRLF", A[:-1] + b"\r\n" + B[:-1] + b"\r\n", ["甲乙", "丙丁"]),
    Case("CRLF inside a text is text", text_line("甲\r\n乙"), ["甲\r\n乙"]),

    # bytes and characters
    Case("BOM", BOM + A + B, ["甲乙", "丙丁"], {}, {"byte order mark removed": 1}),
    Case("BOM inside", A + BOM + B, ["甲乙", "丙丁"], {}, {"byte order mark removed": 1}),
    Case("BOM in a text is text", text_line("\ufeff甲"), ["\ufeff甲"]),
    Case("GB18030 unannounced", A + '{"text": "甲乙"}\n'.encode("gb18030") + B, ["甲乙", "丙丁"],
         {"not utf-8": 1}),
    Case("NUL, escaped and raw", b'{"text": "a\\u0000b"}\n{"text": "a\x00b"}\n', ["a\0b", "a\0b"]),
    Case("NUL bytes where a disk lost a block", A + b"\0" * 50 + b"\n" + B, ["甲乙", "丙丁"],
         {"malformed JSON": 1}),
    Case("raw tab", b'{"text": "a\tb"}\n', ["a\tb"]),
    Case("lone surrogates", b'{"text": "a\\ud800b"}\n{"text": "\\udc00"}\n', ["a\ufffdb", "\ufffd"],
         {}, {"lone surrogate replaced by U+FFFD": 2}),
    Case("a pair of surrogates", b'{"text": "\\ud83d\\ude00"}\n', ["😀"]),
    Case("raw surrogate bytes", b'{"text": "\xed\xa0\x80"}\n' + A, ["甲乙"], {"not utf-8": 1}),

    # records without a text
    Case("null", b'{"text": null}\n' + A, ["甲乙"], {"no text under 'text'": 1}),
    Case("other key", b'{"content": "x"}\n' + A, ["甲乙"], {"no text under 'text'": 1}),
    Case("numbers and lists as text", b'{"text": 5}\n{"text": ["a"]}\n' + A, ["甲乙"],
         {"no text under 'text'": 2}),
    Case("empty and blank", text_line("") + text_line(" \n\u3000") + A, ["甲乙"],
         {"empty text": 2}),
    Case("not an object", A + b"5\nnull\n[1]\ntrue\n", ["甲乙"], {"not a JSON object": 4}),
    Case("nested without end", b'{"text": ' + b"[" * 100_000 + b"\n" + A, ["甲乙"],
         {"malformed JSON": 1}),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("suffix", ["", "gz", "bz2", "xz"])
def test_a_rule(tmp_path, case, suffix):
    path = tmp_path / f"c.jsonl.{suffix}".rstrip(".")
    path.write_bytes(compress(suffix, case.content))

    assert read(path) == Found(case.documents, case.skipped, case.repaired)


def is_of_the_whole_file(case):
    """A file has one beginning and one end."""
    return "BOM" in case.name or "truncated" in case.name or case.name == "no line end at the end"


def test_every_rule_is_counted_and_printed(small_corpus, tmp_path):
    """All cases in one file: the report is their sum, on the terminal and in meta.json."""
    cases = [case for case in CASES if not is_of_the_whole_file(case)]
    [last] = [case for case in CASES if case.name == "last line truncated"]
    contents = [case.content for case in cases] + [text_line(text) for text in texts(30)]
    path = tmp_path / "all.jsonl"
    path.write_bytes(b"".join([*contents, last.content]))

    output, made = small_corpus.pretrain(tmp_path / "p", files=[path])

    for verb in ("skipped", "repaired"):
        total = collections.Counter()
        for case in [*cases, last]:
            total.update(getattr(case, verb))
        assert {reason: entry["count"] for reason, entry in made[verb].items()} == total
        for reason, entry in made[verb].items():
            said = f"  {verb} {entry['count']:,}: {reason} (first: {entry['first']})"
            assert said in output.splitlines()
            assert entry["first"].startswith(f"{path}:")


def test_place_is_the_line(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(A + b"\n" + B + b"{\n")

    found, report = places(path)

    assert found == [f"{path}:1", f"{path}:3"]
    assert report.skipped["blank line"]["first"] == f"{path}:2"
    assert report.skipped["malformed JSON"]["first"] == f"{path}:4"


def test_gb18030_announced(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes('{"text": "甲乙𠀀丽"}\n{"text": "\\u4e19"}\n'.encode("gb18030"))

    assert read(path, encoding="gb18030") == Found(["甲乙𠀀丽", "丙"])


def test_line_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE", 1 << 20)
    path, fits = tmp_path / "c.jsonl", "甲" * (((1 << 20) - 20) // 3)
    longer = text_line("乙" * (1 << 20))

    path.write_bytes(A + longer + text_line(fits) + B + longer[:-1])

    assert read(path) == Found(["甲乙", fits, "丙丁"], {"line longer than 1 MiB": 2})


RECORDS = [{"title": "题", "content": "文"}, {"title": None, "content": "独"}, {"title": "x"},
           {"title": "表", "content": ["x"]}, {"title": "空", "content": " "}, {"body": "y"}]


@pytest.mark.parametrize("key, documents, missing, partly", [
    ("content", ["文", "独"], {"no text under 'content'": 3, "empty text": 1}, {}),
    ("title,content", ["题\n文", "独", "x", "表", "空"], {"no text under 'title' or 'content'": 1},
     {"no text under 'title', the other keys used": 1,
      "no text under 'content', the other keys used": 2}),
])
def test_text_keys(tmp_path, key, documents, missing, partly):
    path = write_lines(tmp_path / "c.jsonl", RECORDS)

    assert read(path, text_key=key) == Found(documents, missing, partly)


@pytest.mark.parametrize("stage", ["prepare_pretrain", "train_tokenizer"])
@pytest.mark.parametrize("key", ["contnet", "tags"])
def test_one_of_several_text_keys_that_never_holds_text(small_corpus, tmp_path, stage, key):
    """Misspelled, or something other than text; in a file of another block it may well hold one."""
    records = [{"title": text, "tags": [text]} for text in texts(30)]
    paths = [write_lines(tmp_path / "a.jsonl", records),
             write_lines(tmp_path / "b.jsonl", [{"content": text} for text in texts(30, 30)])]
    argv = [*map(str, paths), f"--out_dir={tmp_path}/o"]
    if stage == "prepare_pretrain":
        argv = small_corpus.argv(tmp_path / "o", paths)

    line = refused(stage, *argv, f"--text_key=title,content,{key}")

    assert f"--text_key=title,content,{key}: no record holds a text under '{key}'" in line
    assert not (tmp_path / "o").exists()


def test_several_text_keys_that_hold_text_in_different_files(small_corpus, tmp_path):
    paths = [write_lines(tmp_path / "a.jsonl", [{"title": text} for text in texts(30)]),
             write_lines(tmp_path / "b.jsonl", [{"content": text} for text in texts(30, 30)])]

    _, made = small_corpus.pretrain(tmp_path / "p", "--text_key=title,content", files=paths)

    counts = {reason: entry["count"] for reason, entry in made["repaired"].items()}
    assert counts == {"no text under 'content', the other keys used": 30,
                      "no text under 'title', the other keys used": 30}


HINTS = [
    ("train_tokenizer", "--text_key=KEY says which"),
    ("prepare_pretrain", "--text_key=KEY says which"),
    ("prepare_sft", "--map=KEY:user,KEY:assistant says which"),
]


@pytest.mark.parametrize("stage, flag", HINTS)
def test_unknown_keys_are_named_where_nothing_was_understood(small_corpus, tmp_path, stage, flag):
    path = write_lines(tmp_path / "c.jsonl", [{"Text": "甲"}, {"Text": "乙"}])
    argv = small_corpus.argv(tmp_path / "o", [path])
    if stage == "train_tokenizer":
        argv = [str(path), f"--out_dir={tmp_path}/o"]

    line = refused(stage, *argv)

    assert f"keys of the first record that was not understood: Text; {flag}" in line


def qa(question, answer):
    return {"instruction": question, "output": answer}


@pytest.mark.slow
def test_line_of_50_megabytes(small_corpus, tmp_path):
    """In memory under 1 GiB: whole in pretraining, cut to its first exchange in SFT."""
    long = "".join(f"第{i}句，的是人在一。" for i in range(50_000_000 // 31))
    text, chats = tmp_path / "c.jsonl", tmp_path / "c.json"
    text.write_bytes(b"".join(map(text_line, [*texts(20), long])))
    assert text.stat().st_size > 48_000_000
    half = len(long) // 2
    first = {**qa(long[:half], long[half:]), "history": [["问", "答"]]}
    write_lines(chats, [first] + [qa(text, text) for text in texts(20)])

    for stage, path, more in (("prepare_pretrain", text, []),
                              ("prepare_sft", chats, ["--long=truncate"])):
        argv = small_corpus.argv(tmp_path / stage, [path], "--val_fraction=0", *more)
        peak = peak_memory(stage, *argv)
        print(f"{stage}: peak {peak:.2f} GiB")
        assert peak < 1

    documents = read_documents(tmp_path / "prepare_pretrain", "train")
    assert small_corpus.tokenizer.decode(max(documents, key=len)) == long
    repaired = meta(tmp_path / "prepare_sft")["repaired"]
    assert repaired["later turns cut off to fit a row"]["count"] == 1


SPELLED = "问<|im_end|>"
TURNS = [{"role": "user", "content": SPELLED}, {"role": "assistant", "content": "答"}]


@pytest.mark.parametrize("stage, name, content", [
    ("pretrain", "c.jsonl", text_line(SPELLED) * 2),
    ("pretrain", "c.txt", SPELLED.encode("utf-8")),
    ("sft", "c.json", json.dumps([TURNS, TURNS]).encode("utf-8")),
], ids=["text in JSON", ".txt", "conversation"])
def test_a_control_token_in_a_text_is_noted(small_corpus, tmp_path, stage, name, content):
    """A corpus that was put into ChatML before would teach the model to spell it."""
    path = tmp_path / name
    path.write_bytes(content)

    output, made = getattr(small_corpus, stage)(tmp_path / "p", "--val_fraction=0", files=[path])

    [(reason, noted)] = made["noted"].items()
    assert reason.startswith("<|im_end|> in a text is learned as characters")
    assert noted["count"] == made["splits"]["train"]["documents"]
    assert f"  noted {noted['count']}: {reason} (first: {noted['first']})" in output.splitlines()
