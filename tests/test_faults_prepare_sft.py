"""Bad input to prepare_sft.py."""
import json

from support.bad_input import Case, check, common, parametrize
from support.damage import put
from support.small_project import LONG, SFT

CASES = [
    Case("no such file", "nowhere.json --tokenizer=tok --out_dir=new",
         "no such file or directory: nowhere.json"),
    Case("no tokenizer", "chats.jsonl --tokenizer=nowhere --out_dir=new",
         "cannot read nowhere/tokenizer.json"),
    Case("text in place of chats", "corpus.jsonl --tokenizer=tok --out_dir=new", "no conversation"),
    Case(".txt", "corpus.txt --tokenizer=tok --out_dir=new",
         "conversations come as JSON or parquet, not as .txt", put("corpus.txt", "你好")),
    Case("empty file", "empty.jsonl --tokenizer=tok --out_dir=new",
         "the input holds no", put("empty.jsonl", "")),
    Case("no answers", "bad.jsonl --tokenizer=tok --out_dir=new",
         "no assistant turn",
         put("bad.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')),
    Case("unknown role", "bad.jsonl --tokenizer=tok --out_dir=new --strict",
         "bad.jsonl:1: unknown role",
         put("bad.jsonl", '{"messages": [{"role": "cat", "content": "a"}]}\n')),
    Case("rows too short for any", SFT + "--block_size=8", "40: exchange longer than a row"),
    Case("every chat too long", "long.jsonl --tokenizer=tok --out_dir=new --block_size=64",
         "exchange longer than a row",
         put("long.jsonl", json.dumps({"instruction": LONG, "output": "好"}) + "\n")),
    Case("block_size 0", SFT + "--block_size=0", "block_size=0"),
    Case("block_size of 7", SFT + "--block_size=7", "block_size=7 must be"),
    Case("negative block_size", SFT + "--block_size=-512", "block_size=-512"),
    Case("huge block_size", SFT + "--block_size=1e15", "block_size"),
    Case("fraction above 1", SFT + "--val_fraction=2", "val_fraction"),
    Case("fraction is no number", SFT + "--val_fraction=nan", "val_fraction"),
    Case("too many processes", SFT + "--processes=1001", "processes=1001"),
    Case("negative show", SFT + "--show=-1", "show=-1"),
    Case("no batch", SFT + "--batch_size=-1", "batch_size=-1"),
    Case("out_dir with other things", "chats.jsonl --tokenizer=tok --out_dir=out",
         "out holds other things"),
]


@parametrize(CASES + common("block_size", near="blocksize"))
def test_bad_input(project, case):
    check(project, "prepare_sft", case)
