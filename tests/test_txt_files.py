"""Plain text: encodings, line ends, and what a document of it is."""
import json

import pytest

from minillm import txt_documents
from minillm.errors import UserError
from support.preparation_runs import finish, refused
from support.reading import BOMS, Found, read

# ---- encodings

@pytest.mark.parametrize("encoding", BOMS)
@pytest.mark.parametrize("text", ["第一行\n第二行\n", "line one\nline two\n"],
                         ids=["Chinese", "English"])
def test_encodings(tmp_path, encoding, text):
    """Told by the byte order mark or by --encoding; without either, the error names it."""
    path = tmp_path / "c.txt"

    path.write_bytes(BOMS[encoding] + text.replace("\n", "\r\n").encode(encoding))
    assert read(path).items == [text]

    path.write_bytes(text.encode(encoding))
    assert read(path, encoding=encoding) == Found([text])
    if encoding != "utf-8":
        proposal = f"NUL bytes: it looks like {encoding}, so try --encoding={encoding}"
        with pytest.raises(UserError, match=proposal):
            read(path)


def test_gbk_announced(tmp_path):
    (tmp_path / "c.txt").write_bytes("甲乙\n丙\n".encode("gbk"))
    assert read(tmp_path / "c.txt", encoding="gbk") == Found(["甲乙\n丙\n"])


def test_utf_8_sig_is_utf_8(tmp_path):
    (tmp_path / "c.txt").write_bytes("\ufeff甲\n\ufeff乙\n".encode())

    found = read(tmp_path / "c.txt", encoding="utf-8-sig")

    assert found == Found(["甲\n乙\n"], {}, {"byte order mark removed": 2})


def test_a_program_is_no_text(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\x7fELF\0\1\2\xff" * 100)
    with pytest.raises(UserError, match="NUL bytes: it is not plain text"):
        read(tmp_path / "c.txt")


def test_a_line_with_nul_bytes_is_skipped(tmp_path):
    text = "好" * 30_000 + "\n"
    (tmp_path / "c.txt").write_text(text + "坏\0\n")

    assert read(tmp_path / "c.txt") == Found([text], {"NUL bytes in a line of text": 1})


PROPOSALS = [
    ("gb18030", "的是在不了有和人这中大为上个国我以要他时来用们"),
    ("big5", "這個國家的歷史與語言，我們應該學習。"),
    ("cp1252", "Le café était fermé, mais l’élève était déjà là."),
]


@pytest.mark.parametrize("encoding, text", PROPOSALS, ids=[encoding for encoding, _ in PROPOSALS])
@pytest.mark.parametrize("wrong", [40, 20])
def test_the_encoding_that_fits_is_proposed(small_corpus, tmp_path, encoding, text, wrong):
    """Of 40 lines all fail, or half of them: how many, why, and what to try."""
    lines = []
    for number in range(40):
        line = f"{number} {text}\n"
        lines.append(line.encode(encoding if number < wrong else "utf-8"))
    (tmp_path / "c.txt").write_bytes(b"".join(lines))

    run = refused if wrong == 40 else finish
    output = run("prepare_pretrain", *small_corpus.argv(tmp_path / "o", [tmp_path / "c.txt"]))

    assert f"skipped {wrong}: not utf-8" in output and f"try --encoding={encoding}" in output


def test_damaged_utf_8_is_not_said_to_look_like_another_encoding(small_corpus, tmp_path):
    """Byte by byte, Chinese in UTF-8 has many letters of cp1252."""
    line = "今天天气很好，我们去公园散步。\n".encode()
    (tmp_path / "c.txt").write_bytes(line[:30] + line[31:] + line)

    output = finish("prepare_pretrain", *small_corpus.argv(tmp_path / "o", [tmp_path / "c.txt"]))

    assert "skipped 1: not utf-8" in output and "looks like" not in output


CHINESE = "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。\n"
FRENCH = "Où l’été s’achève, là-bas, Noël paraît déjà à l’hôtel : ça brûle, œuvre naïve.\n"


@pytest.mark.parametrize("encoding, text", [
    ("gb18030", CHINESE), ("gbk", CHINESE), ("big5", CHINESE), ("shift_jis", CHINESE),
    ("cp1252", FRENCH), ("utf-16", CHINESE), ("utf-32-be", CHINESE), ("utf-16-le", "A line.\n" * 9),
])
@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c.json"])
def test_utf_8_announced_as_something_else_is_refused(tmp_path, encoding, text, name):
    """In a folder where other files have that encoding, too."""
    if name != "c.txt":
        text = json.dumps({"text": text}, ensure_ascii=False, indent=name == "c.json") + "\n"
    (tmp_path / "a.txt").write_bytes("甲乙\n".encode("utf-8" if "cp" in encoding else encoding))
    (tmp_path / name).write_text(text * 2000)        # its head ends inside a character, perhaps

    with pytest.raises(UserError, match=f"{name} is UTF-8, not .*: leave --encoding out"):
        read(tmp_path, encoding=encoding)


def test_utf_8_behind_much_ascii_is_refused(tmp_path):
    """In JSON lines, by the block."""
    lines = ['{"text": "English"}\n'] * 100_000 + [f'{{"text": "{CHINESE[:-1]}"}}\n'] * 100_000
    (tmp_path / "c.jsonl").write_text("".join(lines))

    with pytest.raises(UserError, match="c.jsonl is UTF-8, not gb18030"):
        read(tmp_path / "c.jsonl", encoding="gb18030")


def test_gbk_that_is_utf_8_by_chance_is_read(tmp_path):
    """A few characters, again and again."""
    text = "谭通台统同铜\n" * 500
    assert text.encode("gbk").decode("utf-8")

    (tmp_path / "c.txt").write_bytes(text.encode("gbk"))

    assert read(tmp_path / "c.txt", encoding="gbk") == Found([text])


def test_utf_8_lines_in_a_file_of_another_encoding_are_named(small_corpus, tmp_path):
    """Those that do not decode: the advice is not a third encoding."""
    lines = [CHINESE.encode("gb18030")] * 40 + [("一" + CHINESE).encode()] * 9
    (tmp_path / "c.txt").write_bytes(b"".join(lines))
    argv = small_corpus.argv(tmp_path / "o", [tmp_path / "c.txt"], "--encoding=gb18030")

    output = finish("prepare_pretrain", *argv)

    assert "looks like utf-8: try --encoding=utf-8 if all" in output


# ---- lines

def test_crlf_becomes_lf(tmp_path):
    (tmp_path / "c.txt").write_bytes("\ufeff甲\r\n乙\r\n\n丙\n".encode() + b"\xff\n")

    assert read(tmp_path / "c.txt") == Found(
        ["甲\n乙\n\n丙\n"],
        {"not utf-8": 1},
        {"byte order mark removed": 1, "CRLF line end made LF": 2})


def test_cr_becomes_lf(tmp_path):
    (tmp_path / "c.txt").write_bytes("甲\r乙\r".encode())
    assert read(tmp_path / "c.txt") == Found(["甲\n乙\n"], {}, {"CR line ends made LF": 1})


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_an_endless_line_is_cut_at_sentence_ends(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(txt_documents, "MAX_LINE", 50_000)
    text = "".join(f"第{number}句话，天地玄黄。" for number in range(20_000)) + "\n尾\n"
    (tmp_path / "c.txt").write_bytes(text.encode(encoding))

    found = read(tmp_path / "c.txt", encoding=encoding)

    assert "".join(found.items) == text and len(found.items) > 5
    assert all(part.endswith(("。", "\n")) for part in found.items)
    assert not found.skipped
    assert list(found.repaired) == ["line longer than 0 MiB cut at a sentence end"]


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
@pytest.mark.parametrize("text", ["天地玄黄，" * 900, "a天地𠀀" * 900], ids=["Han", "mixed"])
def test_a_long_line_without_a_sentence_is_cut_between_characters(tmp_path, monkeypatch, text,
                                                                  encoding):
    for limit in range(1000, 1008):
        monkeypatch.setattr(txt_documents, "MAX_LINE", limit)
        (tmp_path / "c.txt").write_bytes(text.encode(encoding))

        found = read(tmp_path / "c.txt", encoding=encoding)

        assert "".join(found.items) == text and not found.skipped


# ---- documents

DOCUMENTS = {
    "file": ["一\n二\n\n三\n \n\n", "四"],
    "paragraph": ["一\n二", "三", "四"],
    "line": ["一", "二", "三", "四"],
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_is(tmp_path, document):
    (tmp_path / "c.txt").write_text("一\n二\n\n三\n \n\n<|endoftext|>\n四")
    assert read(tmp_path / "c.txt", document=document) == Found(DOCUMENTS[document])


def test_a_line_of_endoftext_ends_a_document(tmp_path):
    """With CRLF too; inside a line it is text, and a blank document is none."""
    text = "甲\n<|endoftext|>\n \n<|endoftext|>\r\n乙<|endoftext|>"
    (tmp_path / "c.txt").write_bytes(text.encode())

    assert read(tmp_path / "c.txt").items == ["甲\n", "乙<|endoftext|>"]


def test_a_book_is_cut_at_line_ends(tmp_path):
    book = "".join(f"第{i}行\n" for i in range(20_000))
    (tmp_path / "c.txt").write_text(book)

    parts = read(tmp_path / "c.txt").items

    assert "".join(parts) == book and len(parts) > 5
    for part in parts:
        assert part.endswith("\n") and len(part.encode()) < txt_documents.TXT_DOCUMENT + 100
