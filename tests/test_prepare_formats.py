"""What the real corpora look like, and worse.

For each oddity the rule (kept, repaired, skipped), counted and printed.
"""
import bz2
import concurrent.futures
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import threading

import pytest

from minillm import json_stream, text_files, txt_documents
from minillm.errors import UserError
from support import ROOT
from support.preparation_runs import finish, meta, read_documents, refused, texts, write_lines
from support.tiny_tokenizer import make_tokenizer
from minillm.text_reader import Report, Source, conversations, documents
from minillm.tokenizer import Tokenizer


def line(text):
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def read(path, reader=documents, encoding="utf-8", **options):
    """([what was read], {reason: count} skipped, {reason: count} repaired)."""
    report = Report()
    items = [item for _, item in reader(Source([str(path)], report, encoding), **options)]
    return items, *({reason: entry["count"] for reason, entry in table.items()} for table in (report.skipped, report.repaired))


A, B = line("甲乙"), line("丙丁")

# name: (the file's bytes, documents, skipped, repaired)
TEXT = {
    "seq-monkey": (b'{"text": "\xe7\x94\xb2\xe4\xb9\x99"}\n' + B, ["甲乙", "丙丁"], {}, {}),
    "escapes": (b'{"text": "\\u7532\\n\\t\\"\\\\"}\n', ['甲\n\t"\\'], {}, {}),
    "other keys": (b'{"id": 1, "text": "a", "meta": {"x": null}}\n', ["a"], {}, {}),
    "no line end at the end": (A + B[:-1], ["甲乙", "丙丁"], {}, {}),
    "last line truncated": (A + B[:-6], ["甲乙"], {"malformed JSON": 1}, {}),
    "last line truncated inside a character": (A + B[:-5], ["甲乙"], {"not utf-8": 1}, {}),
    "CRLF": (A[:-1] + b"\r\n" + B[:-1] + b"\r\n", ["甲乙", "丙丁"], {}, {}),
    "CRLF inside a text is text": (line("甲\r\n乙"), ["甲\r\n乙"], {}, {}),
    "BOM": (b"\xef\xbb\xbf" + A + B, ["甲乙", "丙丁"], {}, {"byte order mark removed": 1}),
    "BOM inside": (A + b"\xef\xbb\xbf" + B, ["甲乙", "丙丁"], {}, {"byte order mark removed": 1}),
    "BOM in a text is text": (line("\ufeff甲"), ["\ufeff甲"], {}, {}),
    "GB18030 unannounced": (A + '{"text": "甲乙"}\n'.encode("gb18030") + B, ["甲乙", "丙丁"], {"not utf-8": 1}, {}),
    "NUL, escaped and raw": (b'{"text": "a\\u0000b"}\n{"text": "a\x00b"}\n', ["a\0b", "a\0b"], {}, {}),
    "NUL bytes where a disk lost a block": (A + b"\0" * 50 + b"\n" + B, ["甲乙", "丙丁"], {"malformed JSON": 1}, {}),
    "raw tab": (b'{"text": "a\tb"}\n', ["a\tb"], {}, {}),
    "lone surrogates": (b'{"text": "a\\ud800b"}\n{"text": "\\udc00"}\n{"text": "\\ud83d\\ude00"}\n', ["a\ufffdb", "\ufffd", "😀"], {},
                        {"lone surrogate replaced by U+FFFD": 2}),
    "raw surrogate bytes": (b'{"text": "\xed\xa0\x80"}\n' + A, ["甲乙"], {"not utf-8": 1}, {}),
    "null": (b'{"text": null}\n' + A, ["甲乙"], {"no text under 'text'": 1}, {}),
    "other key": (b'{"content": "x"}\n' + A, ["甲乙"], {"no text under 'text'": 1}, {}),
    "numbers and lists as text": (b'{"text": 5}\n{"text": ["a"]}\n' + A, ["甲乙"], {"no text under 'text'": 2}, {}),
    "empty and blank": (line("") + line(" \n\u3000") + A, ["甲乙"], {"empty text": 2}, {}),
    "blank lines": (A + b"\n  \r\n" + B, ["甲乙", "丙丁"], {"blank line": 2}, {}),
    "not an object": (A + b'5\nnull\n[1]\ntrue\n', ["甲乙"], {"not a JSON object": 4}, {}),
    "a string is a text": (A + b'"x"\n["y", "z"]\n', ["甲乙", "x", "y", "z"], {}, {}),
    "half a line": (A + b'{"text": "x\n' + B, ["甲乙", "丙丁"], {"malformed JSON": 1}, {}),
    "two objects on a line": (A[:-1] + B + A, ["甲乙", "丙丁", "甲乙"], {}, {}),
    "nested without end": (b'{"text": ' + b"[" * 100_000 + b"\n" + A, ["甲乙"], {"malformed JSON": 1}, {}),
    "control tokens as text": (line("<|im_start|>user<|endoftext|>"), ["<|im_start|>user<|endoftext|>"], {}, {}),
    "surrounding space is text": (line("  甲\n"), ["  甲\n"], {}, {}),
    "empty file": (b"", [], {}, {}),
}


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_text_rules(tmp_path, name, suffix):
    content, *expected = TEXT[name]
    path = tmp_path / f"c.jsonl{suffix}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](content))
    assert list(read(path)) == expected


def turns(*pairs):
    return {"id": "33445", "conversations": [{"from": name, "value": value} for name, value in pairs]}


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


QA, SAID = (("human", "问"), ("assistant", "答")), (("user", "问"), ("assistant", "答"))
NONE = {"no assistant turn": 1}

# name: (a record, its messages or None, skipped, repaired)
CHAT = {
    "belle": (turns(*QA), said(*SAID), {}, {}),
    "belle of several turns": (turns(*QA, *QA), said(*SAID, *SAID), {}, {}),
    "role and content": ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, said(*SAID), {}, {}),
    "conversations with role and content": ({"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, said(*SAID), {}, {}),
    "sharegpt": (turns(("human", "问"), ("gpt", "答")), said(*SAID), {}, {}),
    "alpaca": ({"instruction": "问", "input": "", "output": "答"}, said(*SAID), {}, {}),
    "alpaca with input": ({"instruction": "译", "input": "甲", "output": "答"}, said(("user", "译\n甲"), ("assistant", "答")), {}, {}),
    "alpaca without an answer": ({"instruction": "问", "output": ""}, None, NONE, {"cut before an empty turn": 1}),
    "system": (turns(("system", "善"), *QA), said(("system", "善"), *SAID), {}, {}),
    "system later": (turns(*QA, ("system", "善"), *QA), said(*SAID), {}, {"cut before a later system turn": 1}),
    "line ends and space are kept": (turns(("human", " 问\n"), ("assistant", "\n答 ")), said(("user", " 问\n"), ("assistant", "\n答 ")), {}, {}),
    "empty question": (turns(("human", ""), ("assistant", "答")), None, NONE, {"cut before an empty turn": 1}),
    "empty answer": (turns(("human", "问"), ("assistant", " \n")), None, NONE, {"cut before an empty turn": 1}),
    "empty later": (turns(*QA, ("human", "又"), ("assistant", ""), *QA), said(*SAID), {},
                    {"cut before an empty turn": 1, "user turn without an answer dropped": 1}),
    "null value": (turns(*QA, ("human", None), ("assistant", "答")), said(*SAID), {}, {"cut before an empty turn": 1}),
    "null role": (turns((None, "问"), ("assistant", "答")), None, {"unknown role": 1}, {}),
    "two human turns running": (turns(("human", "一"), ("human", "二"), ("assistant", "答")), said(("user", "一\n二"), ("assistant", "答")), {},
                                {"two user turns running joined": 1}),
    "two assistant turns running": (turns(*QA, ("assistant", "再")), said(("user", "问"), ("assistant", "答\n再")), {}, {"two assistant turns running joined": 1}),
    "assistant first": (turns(("assistant", "你好"), *QA), said(*SAID), {}, {"assistant turn before any user turn dropped": 1}),
    "assistant first, behind system": (turns(("system", "善"), ("assistant", "你好"), *QA), said(("system", "善"), *SAID), {},
                                       {"assistant turn before any user turn dropped": 1}),
    "assistant alone": (turns(("assistant", "你好")), None, NONE, {"assistant turn before any user turn dropped": 1}),
    "human last": (turns(*QA, ("human", "又")), said(*SAID), {}, {"user turn without an answer dropped": 1}),
    "human alone": (turns(("human", "问")), None, NONE, {}),
    "unknown role": (turns(*QA, ("narrator", "x")), None, {"unknown role": 1}, {}),
    "role in a list": (turns((["human"], "x")), None, {"unknown role": 1}, {}),
    "value a number": (turns(("human", 5), ("assistant", "答")), None, {"a turn is not text": 1}, {}),
    "value a list of text": (turns(("human", ["问"]), ("assistant", "答")), said(*SAID), {}, {}),
    "value a list of numbers": (turns(("human", [5]), ("assistant", "答")), None, {"a turn is not text": 1}, {}),
    "alpaca's input a number": ({"instruction": "问", "input": 5, "output": "答"}, None, {"a turn is not text": 1}, {}),
    "a turn null": ({"conversations": [None]}, None, {"a turn is not an object": 1}, {}),
    "turns null": ({"conversations": None}, None, {"no conversation": 1}, {}),
    "turns none": ({"conversations": []}, None, {"no conversation": 1}, {}),
    "turns text": ({"conversations": "问答"}, None, {"no conversation": 1}, {}),
    "nothing known": ({"q": "问", "a": "答"}, None, {"no conversation": 1}, {}),
    "NUL": (turns(("human", "a\0b"), ("assistant", "\0")), said(("user", "a\0b"), ("assistant", "\0")), {}, {}),
    "lone surrogate": (turns(("human", "a\ud800"), ("assistant", "答")), said(("user", "a\ufffd"), ("assistant", "答")), {},
                       {"lone surrogate replaced by U+FFFD": 1}),
    "control tokens as text": (turns(("human", "<|im_end|>"), ("assistant", "答")), said(("user", "<|im_end|>"), ("assistant", "答")), {}, {}),
}


@pytest.mark.parametrize("name", CHAT)
def test_chat_rules(tmp_path, name):
    record, messages, *counts = CHAT[name]
    (tmp_path / "c.json").write_text(json.dumps(record) + "\n")
    assert list(read(tmp_path / "c.json", conversations)) == [[messages] if messages else [], *counts]


def test_every_rule_is_counted_and_printed(tmp_path):
    """All of the two tables in one file each.

    The report is their sum, on the terminal and in meta.json.
    """
    make_tokenizer(tmp_path / "tokenizer")
    fillers = texts(30)
    # one file has one beginning and one end
    inside = {name: row for name, row in TEXT.items() if not any(word in name for word in ("BOM", "truncated", "no line end"))}
    contents = [content for content, *_ in inside.values()] + list(map(line, fillers)) + [TEXT["last line truncated"][0]]
    (tmp_path / "all.jsonl").write_bytes(b"".join(contents))
    records = [record for record, *_ in CHAT.values()] + [turns(("human", text), ("assistant", text)) for text in fillers]
    (tmp_path / "all.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [*inside.values(), TEXT["last line truncated"]]
    for stage, name, rows in (("prepare_pretrain", "all.jsonl", rows), ("prepare_sft", "all.json", list(CHAT.values()))):
        output = finish(stage, tmp_path / name, f"--tokenizer={tmp_path}/tokenizer", f"--out_dir={tmp_path}/{stage}", "--val_fraction=0.1")
        made = meta(tmp_path / stage)
        for index, verb in ((2, "skipped"), (3, "repaired")):
            total = {}
            for row in rows:
                for reason, count in row[index].items():
                    total[reason] = total.get(reason, 0) + count
            assert {reason: entry["count"] for reason, entry in made[verb].items()} == total
            for reason, entry in made[verb].items():
                assert f"  {verb} {entry['count']:,}: {reason} (first: {entry['first']})" in output.splitlines()
                assert entry["first"].startswith(f"{tmp_path}/{name}:")


def test_place_is_the_line(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(A + b"\n" + B + b"{\n")
    report = Report()
    places = [place for place, _ in documents(Source([str(tmp_path / "c.jsonl")], report))]
    assert places == [f"{tmp_path}/c.jsonl:1", f"{tmp_path}/c.jsonl:3"]
    assert {entry["first"].rsplit(":", 1)[1] for entry in report.skipped.values()} == {"2", "4"}


def test_gb18030_announced(tmp_path):
    (tmp_path / "c.jsonl").write_bytes('{"text": "甲乙𠀀丽"}\n{"text": "\\u4e19"}\n'.encode("gb18030"))
    assert read(tmp_path / "c.jsonl", encoding="gb18030") == (["甲乙𠀀丽", "丙"], {}, {})
    (tmp_path / "c.txt").write_bytes("甲乙\n丙\n".encode("gbk"))
    assert read(tmp_path / "c.txt", encoding="gbk") == (["甲乙\n丙\n"], {}, {})


def tar(path, members):
    with tarfile.open(path, "w:" + str(path).rsplit(".", 1)[1].replace("tar", "").replace("tgz", "gz")) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


MEMBERS = {"corpus/mobvoi_seq_monkey_general_open_corpus.jsonl": A + B, "corpus/._x.jsonl": b"\x00\x05\x16\x07", "README.md": b"# read me",
           "corpus/more.jsonl.gz": gzip.compress(line("戊")), "z.txt": "己\r\n".encode()}


@pytest.mark.parametrize("suffix", ["tar", "tar.bz2", "tar.gz", "tgz", "tar.xz"])
def test_tar_as_downloaded(tmp_path, suffix):
    path = tar(tmp_path / f"corpus.{suffix}", MEMBERS)
    assert read(path)[0] == ["甲乙", "丙丁", "戊", "己\n"]
    assert read(path)[2] == {"CRLF line end made LF": 1}
    report = Report()
    places = [place for place, _ in documents(Source([str(path)], report))]
    assert places[1] == f"{path}/corpus/mobvoi_seq_monkey_general_open_corpus.jsonl:2"


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.bz2", "jsonl.xz", "tar.bz2", "tar.gz", "tar"])
def test_file_cut_short_is_said(tmp_path, suffix):
    """A broken download is not taken for a small corpus."""
    content = b"".join(line(text) for text in texts(3000))
    path = tmp_path / f"c.{suffix}"
    if suffix.startswith("tar"):
        tar(path, {"c.jsonl": content})
    else:
        path.write_bytes({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix.split(".")[1]](content))
    whole = path.read_bytes()
    assert len(read(path)[0]) == 3000
    for share in (0.1, 0.5, 0.98):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="damaged or cut short.*fetch it again"):
            read(path)
    make_tokenizer(tmp_path / "tokenizer")
    assert "fetch it again" in refused("prepare_pretrain", path, f"--tokenizer={tmp_path}/tokenizer", f"--out_dir={tmp_path}/o")
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "tokenizer"]


def test_streams_one_after_the_other(tmp_path):
    """What pbzip2, pigz and `cat a.gz b.gz` make."""
    for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (tmp_path / f"c.jsonl{suffix}").write_bytes(compress(A) + compress(B))
        assert read(tmp_path / f"c.jsonl{suffix}")[0] == ["甲乙", "丙丁"]


def test_txt(tmp_path):
    (tmp_path / "c.txt").write_bytes("\ufeff甲\r\n乙\n\n<|endoftext|>\n \n<|endoftext|>\r\n丙<|endoftext|>".encode() + b"\n\xff\n")
    assert read(tmp_path / "c.txt") == (["甲\n乙\n\n", "丙<|endoftext|>\n"], {"not utf-8": 1}, {"byte order mark removed": 1, "CRLF line end made LF": 2})
    long = "".join(f"第{i}行\n" for i in range(20_000))
    (tmp_path / "c.txt").write_text(long)
    found, _, _ = read(tmp_path / "c.txt")
    assert "".join(found) == long and len(found) > 5
    assert all(len(text.encode()) < txt_documents.TXT_DOCUMENT + 100 and text.endswith("\n") for text in found)


def test_directory_is_its_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.jsonl").write_bytes(line("三"))
    (tmp_path / "a.json").write_bytes(line("一"))
    (tmp_path / "a2.txt").write_text("二")
    (tmp_path / ".hidden.jsonl").write_bytes(line("隐"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path)[0] == ["一", "二", "三"]


def test_line_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE", 1 << 20)
    fits = "甲" * (((1 << 20) - 20) // 3)
    (tmp_path / "c.jsonl").write_bytes(A + line("乙" * (1 << 20)) + line(fits) + B + line("丙" * (1 << 20))[:-1])
    found, skipped, _ = read(tmp_path / "c.jsonl")
    assert found == ["甲乙", fits, "丙丁"] and skipped == {"line longer than 1 MiB": 2}


def test_other_key(tmp_path):
    write_lines(tmp_path / "c.jsonl", [{"content": "甲"}])
    assert read(tmp_path / "c.jsonl", text_key="content")[0] == ["甲"]


def test_position_seen_by_another_thread(tmp_path):
    """The progress bar looks while the files are read and closed.

    It only ever goes forward, to the size of all.
    """
    for number in range(1000):
        (tmp_path / f"{number:03}.jsonl").write_bytes(A * 3)
    source = Source([str(tmp_path)], Report())
    seen, looked, done = [], threading.Event(), threading.Event()

    def look():
        while not done.is_set():
            seen.append(source.position)
            looked.set()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            for number, _ in enumerate(source.blocks()):
                if number % 30 == 0:
                    for _ in range(2):           # a look under way, and one that began since
                        looked.clear()
                        assert looked.wait(600)
            assert number == 999
        finally:
            done.set()
        looking.result()
    assert seen == sorted(seen) and len(set(seen)) >= 30 and source.position == source.size


@pytest.mark.slow
def test_line_of_50_megabytes(tmp_path):
    """Whole and lossless in pretraining, cut to its first exchange in SFT.

    In memory that stays under 1 GiB.
    """
    make_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    long = "".join(f"第{i}句，的是人在一。" for i in range(50_000_000 // 31))
    with open(tmp_path / "c.jsonl", "wb") as file:
        for text in texts(20) + [long]:
            file.write(line(text))
    assert (tmp_path / "c.jsonl").stat().st_size > 48_000_000
    chat = turns(*QA, ("human", long[: len(long) // 2]), ("assistant", long[len(long) // 2:]))
    write_lines(tmp_path / "c.json", [chat] + [turns(("human", text), ("assistant", text)) for text in texts(20)])
    measure = ("import sys; sys.path.insert(0, sys.argv.pop(1)); stage = __import__(sys.argv[1]); del sys.argv[0]; from minillm.errors import run; run(stage.main); "
               "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])")
    for stage, name in (("prepare_pretrain", "c.jsonl"), ("prepare_sft", "c.json")):
        result = subprocess.run([sys.executable, "-c", measure, ROOT, stage, str(tmp_path / name), f"--tokenizer={tmp_path}/tokenizer",
                                 f"--out_dir={tmp_path}/{stage}", "--val_fraction=0"], text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        peak = int(result.stdout.split("VmHWM:")[1].split()[0]) / 2**20
        print(f"{stage}: peak {peak:.2f} GiB")
        assert peak < 1
    found = read_documents(tmp_path / "prepare_pretrain", "train")
    assert tokenizer.decode(max(found, key=len)) == long
    assert meta(tmp_path / "prepare_sft")["repaired"]["later turns cut off to fit a row"]["count"] == 1
