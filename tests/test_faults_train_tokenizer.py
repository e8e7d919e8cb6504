"""Bad input to train_tokenizer.py."""
import gzip
import os

from support.bad_input import Case, check, common, parametrize
from support.damage import forbid, make, put

CASES = [
    Case("no such file", "nowhere.jsonl --out_dir=new", "no such file or directory: nowhere.jsonl"),
    Case("unknown suffix", "corpus.docx --out_dir=new",
         "corpus.docx is of no known kind: .jsonl", put("corpus.docx", "x")),
    Case("folder without text", "empty --out_dir=new", "empty holds no file of a known kind: .jsonl", make("empty")),
    Case("too many processes", "corpus.jsonl --out_dir=new --processes=1001", "processes=1001"),
    Case("empty file", "empty.jsonl --out_dir=new", "holds no text", put("empty.jsonl", "")),
    Case("blank lines only", "blank.txt --out_dir=new",
         "holds no text", put("blank.txt", "\n \n\n")),
    Case("no text in the lines", "bad.jsonl --out_dir=new",
         "holds no text .*bad.jsonl:1", put("bad.jsonl", '{"a": 1}\n')),
    Case("wrong text_key", "corpus.jsonl --text_key=content --out_dir=new",
         "holds no text .--text_key=content"),
    Case("JSON array cut short", "array.json --out_dir=new",
         "malformed JSON, with all that follows.*first: array.json, record 1", put("array.json", '[\n{"text": "a')),
    Case("strict", "bad.jsonl --strict=True --out_dir=new",
         "bad.jsonl:2: malformed JSON", put("bad.jsonl", '{"text": "abc"}\n{"text": \n')),
    Case("gz cut short", "corpus.jsonl.gz --out_dir=new",
         "corpus.jsonl.gz is damaged or cut short",
         put("corpus.jsonl.gz", gzip.compress(os.urandom(9000))[:5000])),
    Case("no gz at all", "corpus.jsonl.gz --out_dir=new",
         "corpus.jsonl.gz", put("corpus.jsonl.gz", "plain text")),
    Case("no xz at all", "corpus.jsonl.xz --out_dir=new",
         "skipped 1: malformed JSON", put("corpus.jsonl.xz", "plain text")),
    Case("no tar at all", "corpus.tar.bz2 --out_dir=new",
         "corpus.tar.bz2 is damaged", put("corpus.tar.bz2", "plain text")),
    Case("unreadable file", "corpus.jsonl --out_dir=new",
         "cannot read corpus.jsonl: Permission denied", forbid("corpus.jsonl")),
    Case("vocabulary over 65,535", "corpus.jsonl --vocab_size=65536 --out_dir=new",
         "vocab_size=65536 must be at least 259 and at most 65,535"),
    Case("vocabulary below the bytes", "corpus.jsonl --vocab_size=200 --out_dir=new",
         "vocab_size=200 must be at least 259"),
    Case("negative vocabulary", "corpus.jsonl --vocab_size=-1 --out_dir=new", "vocab_size=-1"),
    Case("no bytes", "corpus.jsonl --max_bytes=0 --out_dir=new", "max_bytes=0"),
    Case("unknown encoding", "corpus.jsonl --encoding=klingon --out_dir=new",
         "unknown encoding 'klingon'.*gb18030"),
    Case("encoding that isn't of text", "corpus.jsonl --encoding=base64 --out_dir=new",
         "encoding 'base64'"),
    Case("out_dir with other things", "corpus.jsonl --vocab_size=300 --out_dir=out",
         "out holds other things.*a folder of its own"),
    Case("out_dir is a file", "corpus.jsonl --vocab_size=300 --out_dir=chats.jsonl", "chats.jsonl"),
    Case("out_dir below a file", "corpus.jsonl --vocab_size=300 --out_dir=chats.jsonl/tok",
         "chats.jsonl"),
]


@parametrize(CASES + common("vocab_size", near="vocabsize"))
def test_bad_input(project, case):
    check(project, "train_tokenizer", case)
