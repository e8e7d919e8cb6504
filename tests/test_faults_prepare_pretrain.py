"""Bad input to prepare_pretrain.py."""
import json
import lzma
import os

from support.bad_input import Case, check, common, parametrize
from support.damage import cut, each, forbid, link, make, put
from support.small_project import PRETRAIN

FOREIGN = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}

CASES = [
    Case("no such file", "nowhere.txt --tokenizer=tok --out_dir=new",
         "no such file or directory: nowhere.txt"),
    Case("a link to itself", "corpus --tokenizer=tok --out_dir=new",
         "cannot read corpus/a.txt: Too many levels of symbolic links",
         each(make("corpus"), link("a.txt", "corpus/a.txt"))),
    Case("a link to nowhere", "corpus --tokenizer=tok --out_dir=new",
         "cannot read corpus/a.txt: it is a link to b, which is not there: remove it",
         each(make("corpus"), link("b", "corpus/a.txt"))),
    Case("no tokenizer", "corpus.jsonl --tokenizer=nowhere --out_dir=new",
         "cannot read nowhere/tokenizer.json.*train_tokenizer.py"),
    Case("tokenizer cut short", PRETRAIN,
         "tok/tokenizer.json is damaged", cut("tok/tokenizer.json", 0.5)),
    Case("tokenizer is empty", PRETRAIN,
         "tok/tokenizer.json is damaged", put("tok/tokenizer.json", "")),
    Case("tokenizer isn't ours", PRETRAIN,
         "tok/tokenizer.json was not trained by train_tokenizer.py",
         put("tok/tokenizer.json", json.dumps(FOREIGN))),
    Case("tokenizer isn't UTF-8", PRETRAIN,
         "tok/tokenizer.json is damaged", put("tok/tokenizer.json", b"\xff\xfe\x00")),
    Case("a file for the tokenizer", "corpus.jsonl --tokenizer=chats.jsonl --out_dir=new",
         "cannot read chats.jsonl/tokenizer.json: Not a directory"),
    Case("empty corpus", "empty.jsonl --tokenizer=tok --out_dir=new",
         "no (text|document)", put("empty.jsonl", "")),
    Case("chats in place of text", "chats.jsonl --tokenizer=tok --out_dir=new",
         "no text under 'text'"),
    Case("not UTF-8", "gb.txt --tokenizer=tok --out_dir=new",
         "not utf-8", put("gb.txt", "天气很好".encode("gb18030"))),
    Case("unknown encoding", PRETRAIN + "--encoding=klingon", "unknown encoding 'klingon'"),
    Case("encoding without line ends", PRETRAIN + "--encoding=cp037", "cannot be cut into lines"),
    Case("all for validation", PRETRAIN + "--val_fraction=1", "val_fraction"),
    Case("negative fraction", PRETRAIN + "--val_fraction=-0.1", "val_fraction"),
    Case("fraction is no number", PRETRAIN + "--val_fraction=nan", "val_fraction"),
    Case("too many processes", PRETRAIN + "--processes=1001", "processes=1001"),
    Case("no batch", PRETRAIN + "--batch_size=0", "batch_size=0"),
    Case("strict", "bad.jsonl --tokenizer=tok --out_dir=new --strict=True",
         "bad.jsonl:1: not a JSON object", put("bad.jsonl", "5\n")),
    Case("xz cut short", "corpus.txt.xz --tokenizer=tok --out_dir=new",
         "corpus.txt.xz is damaged or cut short",
         put("corpus.txt.xz", lzma.compress(os.urandom(9000))[:5000])),
    Case("out_dir with other things", "corpus.jsonl --tokenizer=tok --out_dir=sft",
         "sft holds other things"),
    Case("out_dir is the tokenizer", "corpus.jsonl --tokenizer=tok --out_dir=tok",
         "tok holds other things"),
    Case("unreadable tokenizer", PRETRAIN,
         "cannot read tok/tokenizer.json: Permission denied", forbid("tok/tokenizer.json")),
]


@parametrize(CASES + common("seed", near="sed"))
def test_bad_input(project, case):
    check(project, "prepare_pretrain", case)
