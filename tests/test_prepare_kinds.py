"""Files that were made for other programs.

Each kind opens, and nothing that means something is lost in silence.
"""
import codecs
import gzip
import json
import os
from typing import NamedTuple

import pytest

from minillm import json_stream, txt_documents
from minillm.chat_names import Names
from minillm.errors import UserError
from minillm.text_reader import Report, Source, conversations, documents
from support.preparation_runs import chats, finish, meta, refused, texts, write_chats, write_lines, write_texts
from support.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def read(path, reader, encoding="utf-8", document="file", **options):
    """(what was read, the report)."""
    report = Report()
    items = [item for _, item in reader(Source([str(path)], report, encoding, document), **options)]
    return items, report


def counts(table):
    return {reason: entry["count"] for reason, entry in table.items()}


def said(*turns):
    """Messages out of "u问" "a答" "s善"; "-答" is an answer that is not supervised."""
    roles = {"u": "user", "a": "assistant", "s": "system", "-": "assistant"}
    messages = [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]
    for message, turn in zip(messages, turns):
        if turn[0] == "-":
            message["supervised"] = False
    return messages


def roles(user, assistant):
    return {"conversations": [{"from": user, "value": "问"}, {"from": assistant, "value": "答"}]}


def messages(*turns, **keys):
    """A record of (role, content) or (role, content, {further keys})."""
    made = [{"role": role, "content": content, **dict(*more)} for role, content, *more in turns]
    return {**keys, "messages": made}


class Chat(NamedTuple):
    name: str
    record: object                       # as JSON, or a string of JSON
    messages: list | None                # None: skipped
    left_out: tuple = ()
    repaired: tuple = ()
    skipped: tuple = ()


QA = (("user", "问"), ("assistant", "答"))
PLAIN = said("u问", "a答")
ANSWERED = {"instruction": "问", "input": "", "output": "答"}

CHATS = [
    # fields that change the meaning
    Chat("system beside turns", messages(*QA, system="善"), said("s善", "u问", "a答")),
    Chat("system_prompt", messages(*QA, system_prompt="善"), said("s善", "u问", "a答")),
    Chat("system beside a pair", {"system": "善", **ANSWERED}, said("s善", "u问", "a答")),
    Chat("system null, system_prompt filled", {"system": None, "system_prompt": "善", **ANSWERED}, said("s善", "u问", "a答")),
    Chat("system empty", {"system": "", **ANSWERED}, PLAIN),
    Chat("system twice the same", messages(("system", "善"), *QA, system="善"), said("s善", "u问", "a答")),
    Chat("system beside a system turn", messages(("system", "美"), *QA, system="善"), said("s善\n美", "u问", "a答"),
         repaired=("two system turns running joined",)),
    Chat("history of pairs", {**ANSWERED, "history": [["一", "甲"], ["二", "乙"]]}, said("u一", "a甲", "u二", "a乙", "u问", "a答")),
    Chat("history of messages", {**ANSWERED, "history": messages(("user", "一"), ("assistant", "甲"))["messages"]},
         said("u一", "a甲", "u问", "a答")),
    Chat("history of records", {**ANSWERED, "history": [{"prompt": "一", "response": "甲"}]}, said("u一", "a甲", "u问", "a答")),
    Chat("history as one flat list", {**ANSWERED, "history": ["一", "甲"]}, said("u一", "a甲", "u问", "a答")),
    Chat("history as text of JSON", {**ANSWERED, "history": '[["一", "甲"]]'}, said("u一", "a甲", "u问", "a答")),
    Chat("history empty list", {**ANSWERED, "history": []}, PLAIN),
    Chat("history empty text", {**ANSWERED, "history": ""}, PLAIN),
    Chat("history null", {**ANSWERED, "history": None}, PLAIN),
    Chat("history that is no list", {**ANSWERED, "history": "早先"}, None, skipped=("history is not a list",)),
    Chat("history and system", {**ANSWERED, "history": [["一", "甲"]], "system": "善"}, said("s善", "u一", "a甲", "u问", "a答")),
    *[Chat(f"a turn with {key}={value!r}", messages(QA[0], ("assistant", "坏", {key: value}), ("user", "二"), ("assistant", "好")),
           said("u问", "-坏", "u二", "a好"))
      for key, value in (("weight", 0), ("weight", 0.0), ("weight", "0"), ("train", False), ("loss", False), ("trainable", False),
                         ("loss_mask", 0), ("loss", "false"), ("loss_weight", 0))],
    *[Chat(f"a turn with {key}={value!r} is learned", messages(QA[0], ("assistant", "答", {key: value})), PLAIN)
      for key, value in (("weight", 1), ("weight", None), ("train", True), ("loss", "true"))],
    Chat("weight of a half", messages(QA[0], ("assistant", "答", {"weight": 0.5})), PLAIN,
         left_out=("weight other than 0 and 1 (taken as 1)",)),
    Chat("a part with weight 0", messages(QA[0], ("assistant", [{"type": "text", "text": "坏", "weight": 0}]), *QA),
         said("u问", "-坏", "u问", "a答")),
    Chat("a record with weight 0", messages(*QA, weight=0), None, skipped=("no turn to learn: all have weight 0",)),
    Chat("a pair with train false", {**ANSWERED, "train": False}, None, skipped=("no turn to learn: all have weight 0",)),
    Chat("a mask of the whole record", messages(*QA, *QA, loss_mask=[0, 0, 0, 1]), said("u问", "-答", "u问", "a答")),
    Chat("all turns with weight 0", messages(QA[0], ("assistant", "答", {"weight": 0})), None,
         skipped=("no turn to learn: all have weight 0",)),
    Chat("joined with a turn of weight 0", messages(*QA, ("assistant", "坏", {"weight": 0}), *QA), said("u问", "-答\n坏", "u问", "a答"),
         repaired=("two assistant turns running joined", "joined with a turn of weight 0: not learned")),
    *[Chat(f"{key} of a turn", messages(QA[0], ("assistant", "答", {key: "先想想"})), PLAIN, left_out=(key,))
      for key in ("reasoning_content", "thinking", "reasoning")],
    Chat("reasoning_content empty", messages(QA[0], ("assistant", "答", {"reasoning_content": ""})), PLAIN),
    Chat("tool_calls beside content", messages(QA[0], ("assistant", "答", {"tool_calls": [{"type": "function"}]})), PLAIN,
         left_out=("tool_calls",)),
    Chat("tools", messages(*QA, tools=[{"type": "function"}]), PLAIN, left_out=("tools",)),
    Chat("tools empty", messages(*QA, tools="[]"), PLAIN),
    Chat("an image", messages(("user", [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "问"}]), QA[1]), PLAIN,
         left_out=("image_url",)),
    Chat("an input that the turns do not hold", messages(*QA, input="别的"), PLAIN, left_out=("input",)),
    Chat("a prompt that the turns hold", messages(*QA, prompt="问", prompt_id="1"), PLAIN),
    # what is empty
    *[Chat(f"system turn {content!r}", messages(("system", content), *QA), PLAIN, repaired=("empty system turn dropped",))
      for content in ("", " \n", None, [])],
    Chat("first assistant turn empty", messages(("assistant", ""), *QA), PLAIN, repaired=("empty first assistant turn dropped",)),
    Chat("system and first assistant turn empty", messages(("system", None), ("assistant", " "), *QA), PLAIN,
         repaired=("empty system turn dropped", "empty first assistant turn dropped")),
    Chat("conversations null, messages filled", {"conversations": None, **messages(*QA)}, PLAIN),
    Chat("conversations empty, a pair filled", {"conversations": [], **ANSWERED}, PLAIN),
    Chat("from null, role filled", {"messages": [{"from": None, "role": "user", "content": "问"}, {"from": "", "role": "assistant", "content": "答"}]}, PLAIN),
    Chat("value null, content filled", {"messages": [{"value": None, "role": "user", "content": "问"}, {"value": "", "role": "assistant", "content": "答"}]}, PLAIN),
    Chat("output null, response filled", {"instruction": "问", "output": None, "response": "答"}, PLAIN),
    Chat("input null", {**ANSWERED, "input": None}, PLAIN),
    Chat("input NaN", '{"instruction": "问", "input": NaN, "output": "答"}', PLAIN),
    Chat("a tool's turn", messages(*QA, ("tool", "x"), ("assistant", "丙")), PLAIN, repaired=("cut before a tool turn",)),
    Chat("a call without words", messages(*QA, ("user", "二"), ("assistant", None, {"tool_calls": [{}]}), ("tool", "x"), ("assistant", "丙")), PLAIN,
         left_out=("tool_calls",), repaired=("cut before a tool turn", "user turn without an answer dropped")),
    Chat("sharegpt's tools", {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}, {"from": "observation", "value": "x"}]},
         PLAIN, repaired=("cut before a tool turn",)),
    Chat("a later system turn", messages(*QA, ("system", "善"), *QA), PLAIN, repaired=("cut before a later system turn",)),
    Chat("two system turns", messages(("system", "甲"), ("system", "乙"), *QA), said("s甲\n乙", "u问", "a答"),
         repaired=("two system turns running joined",)),
    # roles
    *[Chat(f"roles {user} {assistant}", roles(user, assistant), PLAIN) for user, assistant in (
        ("human", "gpt"), ("Human", "Assistant"), ("USER", "ASSISTANT"), ("user ", " assistant"), ("prompter", "assistant"), ("user", "bot"),
        ("user", "Model"), ("user", "ChatGPT"), ("user", "ai"), ("user", "bing"), ("用户", "助手"), ("人类", "机器人"))],
    Chat("developer", messages(("developer", "善"), *QA), said("s善", "u问", "a答")),
    # keys
    *[Chat(f"keys {question} {answer}", {question: "问", answer: "答"}, PLAIN) for question, answer in (
        ("instruction", "output"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"),
        ("input", "target"), ("input", "output"), ("instruction", "response"), ("instruction", "completion"), ("Prompt", "Response"),
        ("INSTRUCTION", "OUTPUT"))],
    *[Chat(f"turns under {key}", {key: messages(*QA)["messages"]}, PLAIN)
      for key in ("conversations", "messages", "conversation", "dialogue", "dialog", "chat", "turns", "Messages")],
    *[Chat(f"turns by {role} and {content}", {"messages": [{role: "user", content: "问"}, {role: "assistant", content: "答"}]}, PLAIN)
      for role in ("from", "role", "speaker", "Role") for content in ("value", "content", "text", "Content")],
    Chat("pairs in turns", {"conversation": [{"human": "问", "assistant": "答"}, {"human": "二", "assistant": "乙"}]}, said("u问", "a答", "u二", "a乙")),
    Chat("a question and its context", {"question": "问", "input": "文", "answer": "答"}, said("u问\n文", "a答")),
    Chat("turns as text of JSON", {"conversations": json.dumps(messages(*QA)["messages"])}, PLAIN),
    Chat("a line that is a list of turns", messages(*QA)["messages"], PLAIN),
    Chat("a part of text", messages(("user", [{"type": "text", "text": "问"}]), ("assistant", [{"type": "text", "text": "答"}])), PLAIN),
    Chat("parts of text", messages(("user", ["问", {"type": "text", "text": "吗"}]), QA[1]), said("u问吗", "a答")),
    Chat("Belle's transcript", {"instruction": "Human:问\nAssistant:答\nHuman:二\nAssistant:", "input": "", "output": "乙"}, said("u问", "a答", "u二", "a乙")),
    Chat("several answers", {"question": "问", "answer": ["甲", "乙"]}, None, skipped=("several answers",)),
]


@pytest.mark.parametrize("case", CHATS, ids=[case.name for case in CHATS])
def test_records(tmp_path, case):
    text = case.record if isinstance(case.record, str) else json.dumps(case.record, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_text(text + "\n")

    found, report = read(tmp_path / "c.jsonl", conversations)

    assert found == ([case.messages] if case.messages else [])
    assert set(report.left_out) == set(case.left_out)
    assert set(report.repaired) == set(case.repaired)
    assert set(report.skipped) == set(case.skipped)


@pytest.mark.parametrize("mapping, record", [
    ("q:user,a:assistant", {"q": "问", "a": "答"}),
    ("甲方:user,乙方:assistant", {"messages": [{"role": "甲方", "content": "问"}, {"role": "乙方", "content": "答"}]}),
    ("who:role,says:content,talk:messages", {"talk": [{"who": "user", "says": "问"}, {"who": "assistant", "says": "答"}]}),
    ("narrator:tool", {"messages": [*messages(*QA)["messages"], {"role": "narrator", "content": "x"}]}),
])
def test_map_names_all_else(tmp_path, mapping, record):
    path = write_lines(tmp_path / "c.jsonl", [record])
    assert read(path, conversations, names=Names(mapping))[0] == [PLAIN]
    assert read(path, conversations)[0] == []


@pytest.mark.parametrize("mapping", ["q", "q:", ":user", "q:teacher"])
def test_map_is_checked(mapping):
    with pytest.raises(UserError, match="NAME:MEANING"):
        Names(mapping)


def test_what_is_left_out_and_unknown_is_said(tokenizer, tmp_path):
    """By key, with the number of records.

    An unknown key only if more than 1% have it, once, and no number of it.
    """
    records = [messages(QA[0], ("assistant", f"答{number}", {"reasoning_content": "想"} if number % 2 else {}), mood="好", id=number)
               for number in range(300)]
    records[5]["rare"] = 1
    write_lines(tmp_path / "c.jsonl", records)
    output = finish("prepare_sft", tmp_path / "c.jsonl", f"--tokenizer={tokenizer}", f"--out_dir={tmp_path}/o", "--val_fraction=0.1")
    assert "  left out: reasoning_content in 150 records" in output.splitlines()
    assert output.count("mood") == 1 and "rare" not in output
    made = meta(tmp_path / "o")
    assert made["left_out"] == {"reasoning_content": 150} and made["unknown_keys"] == ["mood"] and made["version"] == 2


RECORDS = [{"text": "甲\n乙"}, {"text": "丙]}"}, {"text": "丁"}]
VALUES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
SHAPES = {
    "lines": "\n".join(VALUES),
    "array": json.dumps(RECORDS, ensure_ascii=False),
    "array, pretty": json.dumps(RECORDS, ensure_ascii=False, indent=2),
    "array, a record on a line": "[\n" + ",\n".join(VALUES) + "\n]\n",
    "array after blank lines": "\n\n  [" + ",".join(VALUES) + "]",
    "two arrays": json.dumps(RECORDS[:1]) + "\n" + json.dumps(RECORDS[1:]),
    "lines of arrays": json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:]) + "\n",
    "array of strings": json.dumps([record["text"] for record in RECORDS]),
    "lines of strings": "\n".join(json.dumps(record["text"]) for record in RECORDS),
    "concatenated": "".join(VALUES),
    "concatenated with spaces": " ".join(VALUES),
    "pretty objects": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "lines with commas": ",\n".join(VALUES) + ",\n",
    "wrapped": json.dumps({"data": RECORDS}),
    "wrapped, pretty": json.dumps({"data": RECORDS}, indent=2),
    "wrapped, after another key": json.dumps({"version": 1, "data": RECORDS}),
    "CRLF": "\r\n".join(VALUES),
}
BOMS = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
        "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}


@pytest.mark.parametrize("encoding", BOMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_json_shapes(tmp_path, shape, encoding):
    """Every shape in every encoding, told by its byte order mark or by --encoding."""
    expected = [record["text"] for record in RECORDS]
    for mark in (b"", BOMS[encoding]):
        (tmp_path / "c.json").write_bytes(mark + SHAPES[shape].encode(encoding))
        found, report = read(tmp_path / "c.json", documents, encoding="utf-8" if mark else encoding)
        assert found == expected and not report.skipped
        assert counts(report.repaired) == ({"byte order mark removed": 1} if mark else {})


@pytest.mark.parametrize("shape", ["array, pretty", "concatenated", "pretty objects", "wrapped"])
def test_json_is_streamed(tmp_path, monkeypatch, shape):
    """A file may be larger than a value may be; a value over the limit is named."""
    monkeypatch.setattr(json_stream, "MAX_LINE", 300_000)
    many = [{"text": f"{number}" + "甲" * 1000} for number in range(500)]
    dump = {"array, pretty": lambda: json.dumps(many, indent=1, ensure_ascii=False),
            "concatenated": lambda: "".join(json.dumps(record, ensure_ascii=False, indent=0) for record in many),
            "pretty objects": lambda: "\n".join(json.dumps(record, ensure_ascii=False, indent=1) for record in many),
            "wrapped": lambda: json.dumps({"data": many}, ensure_ascii=False)}[shape]
    (tmp_path / "c.json").write_text(dump())
    assert read(tmp_path / "c.json", documents)[0] == [record["text"] for record in many]


def test_json_array_cut_short_and_broken(tmp_path):
    whole = json.dumps(RECORDS, ensure_ascii=False, indent=1)
    (tmp_path / "c.json").write_text(whole[:-8])
    found, report = read(tmp_path / "c.json", documents)
    assert found == ["甲\n乙", "丙]}"] and counts(report.skipped) == {"malformed JSON": 1}


def test_a_first_line_that_is_broken_spoils_no_other(tmp_path):
    for first in ('{"text": "x', "[1, 2", "{", "nonsense", '{"text"'):
        (tmp_path / "c.jsonl").write_text(first + "\n" + "\n".join(VALUES))
        found, report = read(tmp_path / "c.jsonl", documents)
        assert found == [record["text"] for record in RECORDS], first
        assert counts(report.skipped) == {"malformed JSON": 1}


@pytest.mark.parametrize("encoding", BOMS)
@pytest.mark.parametrize("text", ["第一行\n第二行\n", "line one\nline two\n"])
def test_txt_encodings(tmp_path, encoding, text):
    (tmp_path / "c.txt").write_bytes(BOMS[encoding] + text.replace("\n", "\r\n").encode(encoding))
    assert read(tmp_path / "c.txt", documents)[0] == [text]
    (tmp_path / "c.txt").write_bytes(text.encode(encoding))
    assert read(tmp_path / "c.txt", documents, encoding=encoding)[0] == [text]
    if encoding != "utf-8":
        with pytest.raises(UserError, match=f"NUL bytes: it looks like {encoding}, so try --encoding={encoding}"):
            read(tmp_path / "c.txt", documents)


def test_nul_bytes_in_text(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\x7fELF\0\1\2\xff" * 100)
    with pytest.raises(UserError, match="NUL bytes: it is not plain text"):
        read(tmp_path / "c.txt", documents)
    (tmp_path / "c.txt").write_text("好" * 30_000 + "\n" + "坏\0\n")
    found, report = read(tmp_path / "c.txt", documents)
    assert found == ["好" * 30_000 + "\n"] and counts(report.skipped) == {"NUL bytes in a line of text": 1}


def test_utf_8_sig_is_utf_8(tmp_path):
    (tmp_path / "c.txt").write_bytes("甲\n\ufeff乙\n".encode("utf-8-sig"))
    found, report = read(tmp_path / "c.txt", documents, encoding="utf-8-sig")
    assert found == ["甲\n乙\n"] and counts(report.repaired) == {"byte order mark removed": 2}


@pytest.mark.parametrize("encoding, text", [
    ("gb18030", "的是在不了有和人这中大为上个国我以要他时来用们"), ("big5", "這個國家的歷史與語言，我們應該學習。"),
    ("cp1252", "Le café était fermé, mais l’élève était déjà là."),
])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_encoding_that_fits_is_proposed(tokenizer, tmp_path, encoding, text, share):
    """Where lines fail, whatever else is wrong: how many, why, and what to try.

    Not "bring more documents".
    """
    lines = [(f"{number} {text}\n").encode("utf-8" if number >= 40 * share else encoding) for number in range(40)]
    (tmp_path / "c.txt").write_bytes(b"".join(lines))
    arguments = ["prepare_pretrain", tmp_path / "c.txt", f"--tokenizer={tokenizer}", f"--out_dir={tmp_path}/o"]
    output = refused(*arguments) if share == 1 else finish(*arguments)
    assert f"skipped {round(40 * share)}: not utf-8" in output and f"try --encoding={encoding}" in output


def test_txt_documents(tmp_path):
    (tmp_path / "c.txt").write_text("一\n二\n\n三\n \n\n<|endoftext|>\n四")
    for document, expected in (("file", ["一\n二\n\n三\n \n\n", "四"]), ("paragraph", ["一\n二", "三", "四"]), ("line", ["一", "二", "三", "四"])):
        assert read(tmp_path / "c.txt", documents, document=document)[0] == expected


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_endless_line_of_a_txt_is_cut_at_sentences(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(txt_documents, "MAX_LINE", 50_000)
    line = "".join(f"第{number}句话，天地玄黄。" for number in range(20_000))
    (tmp_path / "c.txt").write_bytes((line + "\n尾\n").encode(encoding))
    found, report = read(tmp_path / "c.txt", documents, encoding=encoding)
    assert "".join(found) == line + "\n尾\n" and len(found) > 5
    assert all(text.endswith(("。", "\n")) for text in found)
    assert not report.skipped and list(report.repaired) == ["line longer than 0 MiB cut at a sentence end"]


def test_cr_line_ends(tmp_path):
    (tmp_path / "c.txt").write_bytes("甲\r乙\r".encode())
    found, report = read(tmp_path / "c.txt", documents)
    assert found == ["甲\n乙\n"] and "CR line ends made LF" in report.repaired


def test_hidden_folders_and_files_are_not_read(tmp_path):
    for name in (".ipynb_checkpoints/a.jsonl", ".b.jsonl", "c/d.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_texts(tmp_path / name, [name])
    assert read(tmp_path, documents)[0] == ["c/d.ndjson"]


def test_compression_is_told_by_the_bytes(tmp_path):
    content = "\n".join(VALUES).encode()
    (tmp_path / "named.jsonl").write_bytes(gzip.compress(content))
    (tmp_path / "plain.jsonl.gz").write_bytes(content)
    for name in ("named.jsonl", "plain.jsonl.gz"):
        assert len(read(tmp_path / name, documents)[0]) == 3


def test_several_text_keys(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"title": "题", "content": "文"}, {"title": None, "content": "独"}, {"title": "x"}, {"body": "y"}])
    found, report = read(path, documents, text_key="title,content")
    assert found == ["题\n文", "独", "x"] and counts(report.skipped) == {"no text under 'title' or 'content'": 1}


def test_unknown_keys_are_named_where_nothing_was_understood(tokenizer, tmp_path):
    write_lines(tmp_path / "c.jsonl", [{"Text": "甲"}, {"Text": "乙"}])
    common = f"--tokenizer={tokenizer}", f"--out_dir={tmp_path}/o"
    assert "keys of the first record that was not understood: Text" in refused("prepare_pretrain", tmp_path / "c.jsonl", *common)
    assert "Text" in refused("prepare_sft", tmp_path / "c.jsonl", *common)


def test_parquet(tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    items, talks = texts(500), chats(30)
    (tmp_path / "p").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": items[number * 250: number * 250 + 250]})
        pyarrow.parquet.write_table(table, tmp_path / "p" / f"{number}.parquet", row_group_size=100)
    assert read(tmp_path / "p", documents)[0] == items
    table = pyarrow.Table.from_pylist([{"messages": talk, "tools": None} for talk in talks])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", conversations)[0] == talks
    whole = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="damaged or cut short"):
        read(tmp_path / "c.parquet", conversations)


def test_zstd(tmp_path):
    try:
        from compression import zstd
    except ImportError:
        zstd = pytest.importorskip("backports.zstd")
    content = "\n".join(VALUES).encode()
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(content[:20]) + zstd.compress(content[20:]))
    assert len(read(tmp_path / "c.jsonl.zst", documents)[0]) == 3
    whole = zstd.compress(os.urandom(100_000))
    (tmp_path / "c.jsonl.zst").write_bytes(whole[:50_000])
    with pytest.raises(UserError, match="damaged or cut short"):
        read(tmp_path / "c.jsonl.zst", documents)


@pytest.mark.parametrize("module, name, package", [("pyarrow", "c.parquet", "pyarrow"), ("backports", "c.jsonl.zst", "backports.zstd")])
def test_a_missing_package_is_named(tokenizer, tmp_path, module, name, package):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))

    def hide():
        import sys
        sys.modules.update({module: None, "compression": None})
    line = refused("prepare_sft", tmp_path / name, f"--tokenizer={tokenizer}", f"--out_dir={tmp_path}/o", before=hide)
    assert f"pip install {package}" in line


def test_show_says_what_was_skipped(tokenizer, tmp_path):
    write_chats(tmp_path / "c.jsonl", chats(2) + [[{"role": "user", "content": "长" * 2000}, {"role": "assistant", "content": "短"}]])
    with open(tmp_path / "c.jsonl", "a", encoding="utf-8") as file:
        file.write("{\n")
    output = finish("prepare_sft", tmp_path / "c.jsonl", f"--tokenizer={tokenizer}", "--show=9")
    assert "skipped 1: malformed JSON" in output and "… 5,9" in output and output.count("\n") < 700
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n')
    assert "no conversation was understood (skipped 1: no conversation" in refused(
        "prepare_sft", tmp_path / "c.jsonl", f"--tokenizer={tokenizer}", "--show=1")
