"""The fault battery: bad input to every command-line program ends in exit 2 with one helpful line, and leaves nothing behind.

A case is a program, its arguments, what the line must say, and where needed a function that spoils something in
the folder first. Each runs in a fork of this process (torch is imported once), in a fresh copy of a small project:

    corpus.jsonl  chats.jsonl  tok/  pre/  sft/  out/        text, chats, tokenizer, token files, a trained model

After it every file must be as before, byte for byte, and none must be new.
"""
import dataclasses
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from minillm.errors import run
from support.damage import flip, truncate
from support.processes import run as run_program

PROGRAMS = ["train_tokenizer", "prepare_pretrain", "prepare_sft", "train", "eval", "sample", "chat", "bench.train"]


CHATS = [{"conversations": [{"from": "human", "value": f"{i} 加 {i} 是多少？"}, {"from": "assistant", "value": f"是{2 * i}。"}]} for i in range(40)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project, made by the programs themselves: what all cases start from."""
    folder = tmp_path_factory.mktemp("project")
    write(folder / "corpus.jsonl", "".join(json.dumps({"text": f"第{i}篇：天气很好，我们去公园散步。" * 4}, ensure_ascii=False) + "\n" for i in range(80)))
    write(folder / "chats.jsonl", "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in CHATS))
    for program, argv in (("train_tokenizer", "corpus.jsonl chats.jsonl --vocab_size=300 --out_dir=tok"),
                          ("prepare_pretrain", "corpus.jsonl --tokenizer=tok --out_dir=pre --val_fraction=0.1"),
                          ("prepare_sft", "chats.jsonl --tokenizer=tok --out_dir=sft --val_fraction=0.2 --block_size=64"),
                          ("train", "--data_dir=pre --out_dir=out --block_size=64 --n_layer=1 --n_head=2 --n_kv_head=1 --n_embd=16 --batch_size=2"
                                    " --max_iters=2 --eval_iters=1 --device=cpu")):
        done = run_program(program, argv.split(), folder=folder)
        assert done.status == 0, done.out + done.err
    return folder


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def tree(folder):
    """{path: hash} of every file below `folder`, and every folder."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(where, name), folder)] = "folder"
        for name in files:
            path = os.path.join(where, name)
            mode = os.stat(path).st_mode
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = (mode, hashlib.md5(file.read()).hexdigest())
    return found


# ---- what the cases spoil

def meta(folder, **changes):
    """Change keys of <folder>/meta.json; None takes one away."""
    def spoil():
        with open(f"{folder}/meta.json") as file:
            content = json.load(file)
        for key, value in changes.items():
            content.pop(key) if value is None else content.update({key: value})
        write(f"{folder}/meta.json", json.dumps(content))
    return spoil


def count(folder, split, number):
    def spoil():
        with open(f"{folder}/meta.json") as file:
            content = json.load(file)
        content["splits"][split]["tokens"] = number
        write(f"{folder}/meta.json", json.dumps(content))
    return spoil


def uncounted(folder, key):
    def spoil():
        with open(f"{folder}/meta.json") as file:
            content = json.load(file)
        for counts in content["splits"].values():
            del counts[key]
        write(f"{folder}/meta.json", json.dumps(content))
    return spoil


def put(path, text):
    return lambda: write(path, text)


def put_bytes(path, content):
    def spoil():
        with open(path, "wb") as file:
            file.write(content)
    return spoil


def put_token(path, place, id, dtype="<u2"):
    def spoil():
        tokens = np.fromfile(path, dtype)
        tokens[place] = id
        tokens.tofile(path)
    return spoil


def append(path, content):
    def spoil():
        with open(path, "ab") as file:
            file.write(content)
    return spoil


def remove(path):
    return lambda: shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def make(path):
    return lambda: os.makedirs(path)


def forbid(path):
    def spoil():
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        os.chmod(path, 0)
    return spoil


def no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")


def no_wandb():
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")


def each(*steps):
    return lambda: [step() for step in steps]


def one_token_shorter(path):
    return lambda: os.truncate(path, os.path.getsize(path) - 2)


CHECKPOINT = "out/ckpt_00000002.pt"
TRAIN = "--data_dir=pre --out_dir=new --block_size=64 --n_layer=1 --n_head=2 --n_kv_head=1 --n_embd=16 --batch_size=2 --max_iters=2 --device=cpu "
SFT = TRAIN.replace("pre", "sft")
PRE = "corpus.jsonl --tokenizer=tok --out_dir=new "
CHAT = "chats.jsonl --tokenizer=tok --out_dir=new "
LONG = "很" * 500

# program: [(name, arguments, what the line says, what is spoiled first)]
CASES = {
    "train_tokenizer": [
        ("no such file", "nowhere.jsonl --out_dir=new", "no such file or directory: nowhere.jsonl"),
        ("unknown suffix", "corpus.parquet --out_dir=new", "corpus.parquet is of no known kind: .jsonl", put("corpus.parquet", "x")),
        ("folder without text", "empty --out_dir=new", "empty holds no .jsonl", make("empty")),
        ("empty file", "empty.jsonl --out_dir=new", "holds no text", put("empty.jsonl", "")),
        ("blank lines only", "blank.txt --out_dir=new", "holds no text", put("blank.txt", "\n \n\n")),
        ("no text in the lines", "bad.jsonl --out_dir=new", "holds no text .*bad.jsonl:1", put("bad.jsonl", '{"a": 1}\n')),
        ("wrong text_key", "corpus.jsonl --text_key=content --out_dir=new", "holds no text .--text_key=content"),
        ("JSON array", "array.json --out_dir=new", "array.json is one JSON array.*jq", put("array.json", '[{"text": "a"}]')),
        ("strict", "bad.jsonl --strict=True --out_dir=new", "bad.jsonl:2: malformed JSON", put("bad.jsonl", '{"text": "abc"}\n{"text": \n')),
        ("gz cut short", "corpus.jsonl.gz --out_dir=new", "corpus.jsonl.gz is damaged or cut short", put_bytes("corpus.jsonl.gz", gzip.compress(os.urandom(9000))[:5000])),
        ("no gz at all", "corpus.jsonl.gz --out_dir=new", "corpus.jsonl.gz", put("corpus.jsonl.gz", "plain text")),
        ("no xz at all", "corpus.jsonl.xz --out_dir=new", "corpus.jsonl.xz is damaged", put("corpus.jsonl.xz", "plain text")),
        ("no tar at all", "corpus.tar.bz2 --out_dir=new", "corpus.tar.bz2 is damaged", put("corpus.tar.bz2", "plain text")),
        ("unreadable file", "corpus.jsonl --out_dir=new", "cannot read corpus.jsonl: Permission denied", forbid("corpus.jsonl")),
        ("vocabulary over 65,535", "corpus.jsonl --vocab_size=65536 --out_dir=new", "vocab_size=65536 must be between 259.*65535"),
        ("vocabulary below the bytes", "corpus.jsonl --vocab_size=200 --out_dir=new", "vocab_size=200 must be between 259"),
        ("negative vocabulary", "corpus.jsonl --vocab_size=-1 --out_dir=new", "vocab_size=-1"),
        ("no bytes", "corpus.jsonl --max_bytes=0 --out_dir=new", "max_bytes=0"),
        ("unknown encoding", "corpus.jsonl --encoding=klingon --out_dir=new", "unknown encoding 'klingon'.*gb18030"),
        ("encoding that isn't of text", "corpus.jsonl --encoding=base64 --out_dir=new", "encoding 'base64'"),
        ("out_dir with other things", "corpus.jsonl --vocab_size=300 --out_dir=out", "out holds other things.*a folder of its own"),
        ("out_dir is a file", "corpus.jsonl --vocab_size=300 --out_dir=chats.jsonl", "chats.jsonl"),
        ("out_dir below a file", "corpus.jsonl --vocab_size=300 --out_dir=chats.jsonl/tok", "chats.jsonl"),
    ],
    "prepare_pretrain": [
        ("no such file", "nowhere.txt --tokenizer=tok --out_dir=new", "no such file or directory: nowhere.txt"),
        ("no tokenizer", "corpus.jsonl --tokenizer=nowhere --out_dir=new", "cannot read nowhere/tokenizer.json.*train_tokenizer.py"),
        ("tokenizer cut short", PRE, "tok/tokenizer.json is damaged", lambda: truncate("tok/tokenizer.json", 0.5)),
        ("tokenizer is empty", PRE, "tok/tokenizer.json is damaged", put("tok/tokenizer.json", "")),
        ("tokenizer isn't ours", PRE, "tok/tokenizer.json is no tokenizer of ours", put("tok/tokenizer.json", json.dumps(
            {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}))),
        ("tokenizer isn't UTF-8", PRE, "tok/tokenizer.json is damaged", put_bytes("tok/tokenizer.json", b"\xff\xfe\x00")),
        ("a file for the tokenizer", "corpus.jsonl --tokenizer=chats.jsonl --out_dir=new", "cannot read chats.jsonl/tokenizer.json: Not a directory"),
        ("empty corpus", "empty.jsonl --tokenizer=tok --out_dir=new", "no (text|document)", put("empty.jsonl", "")),
        ("chats in place of text", "chats.jsonl --tokenizer=tok --out_dir=new", "no text under 'text'"),
        ("not UTF-8", "gb.txt --tokenizer=tok --out_dir=new", "not utf-8", put_bytes("gb.txt", "天气很好".encode("gb18030"))),
        ("all for validation", PRE + "--val_fraction=1", "val_fraction"),
        ("negative fraction", PRE + "--val_fraction=-0.1", "val_fraction"),
        ("fraction is no number", PRE + "--val_fraction=nan", "val_fraction"),
        ("no batch", PRE + "--batch_size=0", "batch_size=0"),
        ("strict", "bad.jsonl --tokenizer=tok --out_dir=new --strict=True", "bad.jsonl:1: not a JSON object", put("bad.jsonl", "5\n")),
        ("xz cut short", "corpus.txt.xz --tokenizer=tok --out_dir=new", "corpus.txt.xz is damaged or cut short", put_bytes("corpus.txt.xz", __import__("lzma").compress(os.urandom(9000))[:5000])),
        ("out_dir with other things", "corpus.jsonl --tokenizer=tok --out_dir=sft", "sft holds other things"),
        ("out_dir is the tokenizer", "corpus.jsonl --tokenizer=tok --out_dir=tok", "tok holds other things"),
        ("unreadable tokenizer", PRE, "cannot read tok/tokenizer.json: Permission denied", forbid("tok/tokenizer.json")),
    ],
    "prepare_sft": [
        ("no such file", "nowhere.json --tokenizer=tok --out_dir=new", "no such file or directory: nowhere.json"),
        ("no tokenizer", "chats.jsonl --tokenizer=nowhere --out_dir=new", "cannot read nowhere/tokenizer.json"),
        ("text in place of chats", "corpus.jsonl --tokenizer=tok --out_dir=new", "no conversation"),
        (".txt", "corpus.txt --tokenizer=tok --out_dir=new", "conversations come as JSON lines, not as .txt", put("corpus.txt", "你好")),
        ("empty file", "empty.jsonl --tokenizer=tok --out_dir=new", "the input holds no", put("empty.jsonl", "")),
        ("no answers", "bad.jsonl --tokenizer=tok --out_dir=new", "no assistant turn", put("bad.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')),
        ("unknown role", "bad.jsonl --tokenizer=tok --out_dir=new --strict", "bad.jsonl:1: unknown role", put("bad.jsonl", '{"messages": [{"role": "cat", "content": "a"}]}\n')),
        ("rows too short for any", CHAT + "--block_size=8", "40: too long for a row"),
        ("every chat too long", "long.jsonl --tokenizer=tok --out_dir=new --block_size=64", "too long for a row",
            put("long.jsonl", json.dumps({"instruction": LONG, "output": "好"}) + "\n")),
        ("block_size 0", CHAT + "--block_size=0", "block_size=0"),
        ("negative block_size", CHAT + "--block_size=-512", "block_size=-512"),
        ("huge block_size", CHAT + "--block_size=1e15", "block_size"),
        ("fraction above 1", CHAT + "--val_fraction=2", "val_fraction"),
        ("fraction is no number", CHAT + "--val_fraction=nan", "val_fraction"),
        ("negative show", CHAT + "--show=-1", "show=-1"),
        ("no batch", CHAT + "--batch_size=-1", "batch_size=-1"),
        ("out_dir with other things", "chats.jsonl --tokenizer=tok --out_dir=out", "out holds other things"),
    ],
    "train": [
        ("no data", TRAIN + "--data_dir=nowhere", "cannot read nowhere/meta.json: No such file.*prepare_pretrain.py"),
        ("a file for the data", TRAIN + "--data_dir=corpus.jsonl", "cannot read corpus.jsonl/meta.json: Not a directory"),
        ("unreadable data", TRAIN, "cannot read pre/train.bin: Permission denied", forbid("pre/train.bin")),
        ("meta.json is half", TRAIN, "pre/meta.json is damaged.*prepare the data again", lambda: truncate("pre/meta.json", 0.5)),
        ("meta.json is a list", TRAIN, "pre/meta.json is damaged", put("pre/meta.json", "[]")),
        ("meta.json is nested too deep", TRAIN, "pre/meta.json is damaged", put("pre/meta.json", "[" * 100_000)),
        ("meta.json lacks the splits", TRAIN, "pre/meta.json lacks 'splits'", meta("pre", splits=None)),
        ("meta.json of another kind", TRAIN, "pre/meta.json is damaged.*kind 'images'", meta("pre", kind="images")),
        ("vocabulary is text", TRAIN, "pre/meta.json is damaged.*'300'", meta("pre", vocab_size="300")),
        ("vocabulary over 65,535", TRAIN, "vocabulary of 70000 does not fit into uint16", meta("pre", vocab_size=70000)),
        ("meta.json counts otherwise", TRAIN, r"pre/train.bin holds [\d,]+ tokens, but pre/meta.json says 5", count("pre", "train", 5)),
        ("odd number of bytes", TRAIN, r"pre/train.bin has [\d,]+ bytes, not a whole number of 2-byte tokens", append("pre/train.bin", b"x")),
        ("odd number of bytes in val", TRAIN, "pre/val.bin has", append("pre/val.bin", b"x")),
        ("train.bin a token short", TRAIN, "pre/train.bin holds .* but pre/meta.json says", one_token_shorter("pre/train.bin")),
        ("no val.bin", TRAIN, "cannot read pre/val.bin", remove("pre/val.bin")),
        ("train.bin is a folder", TRAIN, "cannot read pre/train.bin", each(remove("pre/train.bin"), make("pre/train.bin"))),
        ("id outside the vocabulary", TRAIN, "pre/train.bin: token 1,000 is 300, outside the vocabulary of 300", put_token("pre/train.bin", 1000, 300)),
        ("id outside the vocabulary in val", TRAIN, "pre/val.bin: token 3 is 65,?535, outside", put_token("pre/val.bin", 3, 65535)),
        ("SFT: no mask", SFT, "cannot read sft/train_mask.bin", remove("sft/train_mask.bin")),
        ("SFT: mask of another length", SFT, r"sft/train_mask.bin has [\d,]+ entries for [\d,]+ tokens", append("sft/train_mask.bin", b"\1")),
        ("SFT: mask with other values", SFT, "sft/train_mask.bin holds other values than 0 and 1", put_token("sft/train_mask.bin", 7, 9, "u1")),
        ("SFT: nothing learned", SFT, "sft/train_mask.bin marks no token as learned",
            lambda: put_bytes("sft/train_mask.bin", bytes(os.path.getsize("sft/train_mask.bin")))()),
        ("SFT: another block_size", SFT + "--block_size=32", "sft was packed for block_size=64, not 32"),
        ("SFT: no block_size in meta.json", SFT, "sft/meta.json lacks 'block_size'", meta("sft", block_size=None)),
        ("SFT: not whole rows", SFT, "not whole rows of 65", each(append("sft/train.bin", b"\0\0"), append("sft/train_mask.bin", b"\0"),
            lambda: count("sft", "train", os.path.getsize("sft/train.bin") // 2)())),
        ("corpus smaller than a window", TRAIN + "--block_size=100000", "fewer than one window of 100,?001"),
        ("validation smaller than a window", TRAIN, "pre/val.bin holds 9 tokens, fewer than one window.*--eval_interval=0",
            each(lambda: os.truncate("pre/val.bin", 18), count("pre", "val", 9))),
        ("tokenizer gone", TRAIN, "tokenizer.json is missing, or is not the tokenizer", remove("tok")),
        ("another tokenizer", TRAIN, "tokenizer.json is missing, or is not the tokenizer", append("tok/tokenizer.json", b" ")),
        ("vocabulary smaller than the tokenizer's", TRAIN + "--vocab_size=100", "vocab_size=100 is smaller than the tokenizer's 300"),
        ("n_embd not divisible by n_head", TRAIN + "--n_head=3 --n_kv_head=3", "n_embd=16 is not divisible by n_head=3"),
        ("n_head not divisible by n_kv_head", TRAIN + "--n_head=4 --n_kv_head=3", "n_head=4 is not divisible by n_kv_head=3"),
        ("odd head width", TRAIN + "--n_embd=6", "RoPE needs an even head width"),
        ("no layers", TRAIN + "--n_layer=0", "n_layer=0 must be at least 1"),
        ("negative width", TRAIN + "--n_embd=-16", "n_embd=-16"),
        ("negative experts", TRAIN + "--n_expert=-4", "n_expert"),
        ("more experts chosen than there are", TRAIN + "--n_expert=4 --n_expert_per_tok=5", "n_expert_per_tok=5 of n_expert=4"),
        ("a model larger than any machine", TRAIN + "--n_layer=1e9", "n_layer=1000000000 must be at least 1 and at most 10,000"),
        ("a batch larger than any memory", TRAIN + "--batch_size=1e11", "batch_size=100000000000 must be at least 1 and at most"),
        ("rope_theta 0", TRAIN + "--rope_theta=0", "rope_theta=0"),
        ("rope_theta is no number", TRAIN + "--rope_theta=nan", "rope_theta=nan"),
        ("dropout 1", TRAIN + "--dropout=1", "dropout=1.0 must be in"),
        ("batch_size 0", TRAIN + "--batch_size=0", "batch_size=0 must be at least 1"),
        ("learning rate is no number", TRAIN + "--learning_rate=nan", "learning_rate=nan"),
        ("negative learning rate", TRAIN + "--learning_rate=-1", "learning_rate=-1"),
        ("infinite learning rate", TRAIN + "--learning_rate=inf", "learning_rate=inf"),
        ("beta 1", TRAIN + "--beta2=1", "beta2=1.0 must be at least 0 and below 1"),
        ("no length", TRAIN + "--max_iters=0", "max_iters or epochs"),
        ("log_interval 0", TRAIN + "--log_interval=0", "log_interval=0 must be at least 1"),
        ("huge inspect_step", TRAIN + "--inspect_step=1e30", "inspect_step"),
        ("no GPU", TRAIN + "--device=cuda", "torch sees 0 GPUs; try --device=cpu", no_gpu),
        ("unknown device", TRAIN + "--device=abacus", "unknown device 'abacus': auto, cpu, cuda or cuda:N"),
        ("other device", TRAIN + "--device=meta", "device 'meta' is not supported"),
        ("unknown dtype", TRAIN + "--dtype=int4", "unknown dtype 'int4': auto, float32"),
        ("wandb is not there", TRAIN + "--wandb_log", "pip install wandb", no_wandb),
        ("start from nowhere", TRAIN + "--init_from=nowhere", "no model in nowhere"),
        ("start from a folder without a model", TRAIN + "--init_from=pre", "no newest checkpoint in pre"),
        ("resume from an empty folder", TRAIN + "--init_from=resume --out_dir=empty", "no checkpoint in empty: nothing to resume", make("empty")),
        ("resume from nowhere", TRAIN + "--init_from=resume", "no checkpoint in new: nothing to resume"),
        ("a run stands there", TRAIN + "--out_dir=out", "out already holds a run at step 2.*--overwrite=True"),
        ("resume from half a checkpoint", TRAIN + "--out_dir=out --init_from=resume", "every checkpoint in out is damaged", lambda: truncate(CHECKPOINT, 0.5)),
        ("start from half a checkpoint", TRAIN + "--init_from=out", "ckpt_00000002.pt, it is damaged or cut short", lambda: truncate(CHECKPOINT, 0.5)),
        ("start from a flipped bit", TRAIN + "--init_from=out", "ckpt_00000002.pt is damaged: the checksum", lambda: flip(CHECKPOINT, 0.3)),
        ("resume with another shape", TRAIN + "--out_dir=out --init_from=resume --n_layer=2", "n_layer=1, these settings say 2"),
        ("resume with other data", TRAIN + "--out_dir=out --init_from=resume --data_dir=sft", "--allow_other_data=True"),
        ("out_dir is a file", TRAIN + "--out_dir=corpus.jsonl", "corpus.jsonl"),
        ("out_dir below a file", TRAIN + "--out_dir=corpus.jsonl/out", "cannot make the folder 'corpus.jsonl/out' for out_dir: Not a directory"),
        ("empty out_dir", TRAIN + "--out_dir=", "out_dir"),
    ],
    "eval": [
        ("no model", "--out_dir=nowhere", "no model in nowhere.*train.py"),
        ("no checkpoint", "--out_dir=pre", "no newest checkpoint in pre"),
        ("no best", "--out_dir=out --which=best", "no best checkpoint in out", lambda: os.path.exists("out/best.pt") and os.remove("out/best.pt")),
        ("unknown which", "--out_dir=out --which=oldest", "'oldest': newest or best"),
        ("half a checkpoint", "--out_dir=out", "ckpt_00000002.pt, it is damaged or cut short", lambda: truncate(CHECKPOINT, 0.5)),
        ("no tokenizer in it", "--out_dir=out", "cannot read out/tokenizer/tokenizer.json", remove("out/tokenizer/tokenizer.json")),
        ("another tokenizer in it", "--out_dir=out", "is not the tokenizer that the model in out was trained with", append("out/tokenizer/tokenizer.json", b" ")),
        ("no config.py", "--out_dir=out", "out/config.py", remove("out/config.py")),
        ("config.py lacks what is needed", "--out_dir=out", "out/config.py says nothing of data_dir, doc_mask", put("out/config.py", "seed = 1\n")),
        ("data gone", "--out_dir=out", "cannot read pre/meta.json", remove("pre")),
        ("data of another tokenizer", "--out_dir=out", "pre was prepared with another tokenizer", meta("pre", tokenizer_hash="0" * 64)),
        ("SFT data of another block_size", "--out_dir=out --data_dir=sft", "sft was packed for block_size=32", meta("sft", block_size=32)),
        ("meta.json counts no bytes", "--out_dir=out", "meta.json does not count 'bytes'", uncounted("pre", "bytes")),
        ("no questions file", "--out_dir=out --questions=nowhere.jsonl", "no such file or directory: nowhere.jsonl"),
        ("questions without answers", "--out_dir=out --questions=corpus.jsonl", "corpus.jsonl holds no chat that ends with an answer"),
        ("a question longer than the context", "--out_dir=out --questions=long.jsonl", "long.jsonl|context|tokens",
            put("long.jsonl", json.dumps({"instruction": LONG, "output": "好"}) + "\n")),
        ("no batch", "--out_dir=out --batch_size=0", "batch_size"),
        ("negative eval_iters", "--out_dir=out --eval_iters=-1", "eval_iters"),
        ("negative show", "--out_dir=out --show=-1", "show"),
        ("no tokens", "--out_dir=out --max_new_tokens=0", "max_new_tokens"),
        ("no GPU", "--out_dir=out --device=cuda:7", "torch sees", no_gpu),
        ("unknown dtype", "--out_dir=out --dtype=bits", "unknown dtype 'bits'"),
        ("id outside the vocabulary", "--out_dir=out", "pre/val.bin: token 3 is 999, outside the vocabulary", put_token("pre/val.bin", 3, 999)),
    ],
    "sample": [
        ("no model", "--out_dir=nowhere", "no model in nowhere"),
        ("a file for the model", "--out_dir=corpus.jsonl", "no model in corpus.jsonl"),
        ("half a checkpoint", "--out_dir=out", "ckpt_00000002.pt, it is damaged or cut short", lambda: truncate(CHECKPOINT, 0.5)),
        ("unknown checkpoint", "--out_dir=out --checkpoint=oldest", "'oldest': newest or best"),
        ("prompt longer than the context", f"--out_dir=out --prompt={LONG}", r"the prompt is \d+ tokens long, the context holds 64.*--truncate_ctx"),
        ("prompt is not UTF-8", "--out_dir=out --prompt=-", "the prompt is not UTF-8 text", None, b"\xff\xfe\xfd"),
        ("no samples", "--out_dir=out --num_samples=0", "num_samples=0 must be at least 1"),
        ("more samples than memory", "--out_dir=out --num_samples=1e13", "num_samples=10000000000000 must be"),
        ("no tokens", "--out_dir=out --max_new_tokens=0", "max_new_tokens"),
        ("negative temperature", "--out_dir=out --temperature=-1", "temperature"),
        ("temperature is no number", "--out_dir=out --temperature=nan", "temperature"),
        ("negative top_k", "--out_dir=out --top_k=-1", "top_k"),
        ("top_p 0", "--out_dir=out --top_p=0", "top_p"),
        ("top_p above 1", "--out_dir=out --top_p=1.5", "top_p"),
        ("repetition_penalty 0", "--out_dir=out --repetition_penalty=0", "repetition_penalty"),
        ("negative truncate_ctx", "--out_dir=out --truncate_ctx=-5", "truncate_ctx=-5"),
        ("unknown dtype", "--out_dir=out --dtype=half-ish", "unknown dtype"),
        ("no GPU", "--out_dir=out --device=cuda", "torch sees 0 GPUs", no_gpu),
        ("unreadable checkpoint", "--out_dir=out", "ckpt_00000002.pt.*Permission denied", forbid(CHECKPOINT)),
    ],
    "chat": [
        ("no model", "--out_dir=nowhere --prompt=你好", "no model in nowhere"),
        ("no model for the demo", "--prompt=你好", "no model in out/demo_sft: `make demo`"),
        ("nothing on stdin", "--out_dir=out", "there is no message: stdin is empty"),
        ("stdin is not UTF-8", "--out_dir=out", "not UTF-8", None, b"\xc3\x28\xff"),
        ("message longer than the context", f"--out_dir=out --prompt={LONG}", r"the message is \d+ tokens long.*the context holds 64"),
        ("system prompt longer than the context", f"--out_dir=out --prompt=你好 --system={LONG}", r"a system prompt of \d+ tokens does not fit"),
        ("no room at all", "--out_dir=out --prompt=你好 --truncate_ctx=3", "context|truncate_ctx"),
        ("negative truncate_ctx", "--out_dir=out --prompt=你好 --truncate_ctx=-1", "truncate_ctx=-1"),
        ("temperature is infinite", "--out_dir=out --prompt=你好 --temperature=inf", "temperature"),
        ("no tokens", "--out_dir=out --prompt=你好 --max_new_tokens=-3", "max_new_tokens"),
        ("a checkpoint of zeros", "--out_dir=out --prompt=你好", "ckpt_00000002.pt, it is damaged", lambda: put_bytes(CHECKPOINT, bytes(5000))()),
        ("tokenizer cut short", "--out_dir=out --prompt=你好", "out/tokenizer/tokenizer.json is damaged", lambda: truncate("out/tokenizer/tokenizer.json", 0.9)),
    ],
    "bench.train": [
        ("unknown bench", "speed", "bench.train measures train, decode or data, not 'speed'"),
        ("no GPU", "train --device=cuda", "torch sees 0 GPUs", no_gpu),
        ("unknown dtype", "train --device=cpu --dtype=int8", "unknown dtype 'int8'"),
        ("negative batch", "train --device=cpu --batch_size=-4", "batch_size=-4"),
        ("no repeats", "train --device=cpu --repeats=0", "repeats=0"),
        ("no repeats of decoding", "decode --device=cpu --repeats=-1", "repeats=-1"),
        ("no token files", "train --device=cpu --data_dir=nowhere", "cannot read nowhere/meta.json"),
        ("no tokens", "decode --device=cpu --new_tokens=0", "new_tokens=0"),
        ("no prompt", "decode --device=cpu --prompt=0", "prompt=0"),
    ],
}

# of each program a key that takes a whole number, and the same misspelt
KEYS = {"train_tokenizer": ("vocab_size", "vocabsize"), "prepare_pretrain": ("seed", "sed"), "prepare_sft": ("block_size", "blocksize"),
        "train": ("batch_size", "batch_sise"), "eval": ("batch_size", "batchsize"), "sample": ("num_samples", "num_sample"),
        "chat": ("max_new_tokens", "max_new_token"), "bench.train": ("repeats", "repeat")}


def common_cases(program):
    """What every program must say of a bad flag or config file."""
    key, near = KEYS[program]
    return [
        ("unknown flag", f"--{near}=1", f"unknown flag --{near}: did you mean {key}"),
        ("nothing near", "--xyzzyxyzzy=1", "unknown flag --xyzzyxyzzy: see --help"),
        ("ill-typed flag", f"--{key}=many", f"--{key} takes a whole number, not 'many'"),
        ("fraction for a whole number", f"--{key}=1.5", f"--{key} takes a whole number, not '1.5'"),
        ("infinity for a whole number", f"--{key}=inf", f"--{key} takes a whole number, not 'inf'"),
        ("NaN for a whole number", f"--{key}=nan", f"--{key} takes a whole number, not 'nan'"),
        ("flag without a value", f"--{key}", f"--{key} needs a value"),
        ("one dash", f"-{key}=1", f"flags begin with two dashes: --{key}"),
        ("config file missing", "nowhere.py", "cannot read config file nowhere.py: No such file"),
        ("config file is a folder", "folder.py", "cannot read config file folder.py: Is a directory", make("folder.py")),
        ("config file that raises", "bad.py", "config file bad.py: ZeroDivisionError: division by zero", put("bad.py", "x = 1 / 0\n")),
        ("config file that leaves", "bad.py", "config file bad.py: SystemExit", put("bad.py", "import sys\nsys.exit(0)\n")),
        ("config file that is no Python", "bad.py", "config file bad.py: SyntaxError", put("bad.py", "batch size = 3\n")),
        ("config file that is not UTF-8", "bad.py", "cannot read config file bad.py", put_bytes("bad.py", b"# \xb0\xae\n")),
        ("config file with NUL", "bad.py", "config file bad.py: ", put_bytes("bad.py", b"a = 1\0\n")),
        ("unknown key in a config file", "bad.py", f"unknown key in bad.py: {near}: did you mean {key}", put("bad.py", f"{near} = 1\n")),
        ("ill-typed key in a config file", "bad.py", f"bad.py: {key} takes a whole number, not 'many'", put("bad.py", f"{key} = 'many'\n")),
        ("infinity in a config file", "bad.py", f"bad.py: {key} takes a whole number, not inf", put("bad.py", f"{key} = float('inf')\n")),
    ]


def parameters(table):
    """[(program, arguments, pattern, spoil, stdin)] for pytest, of {program: rows}; a row may leave out the last two."""
    return [pytest.param(program, arguments, pattern, *(*rest, *(None, b"")[len(rest):]), id=f"{program}: {name}")
            for program in PROGRAMS for name, arguments, pattern, *rest in table[program]]


ALL = parameters({program: CASES[program] + common_cases(program) for program in PROGRAMS})


@pytest.mark.parametrize("program, arguments, pattern, spoil, stdin", ALL)
def test_bad_input(project, tmp_path, program, arguments, pattern, spoil, stdin):
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        if spoil:
            spoil()
    finally:
        os.chdir(here)
    before = tree(folder)
    done = run_program(program, arguments.split(), folder=folder, stdin=stdin)
    text = done.out + done.err
    assert done.status == 2, f"exit {done.status}\n{text}"
    assert "Traceback" not in text
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith(f"{program}.py: "), done.err
    assert len(lines[0]) < 500 and re.search(pattern, lines[0]), lines[0]
    after = tree(folder)
    assert after == before, f"left behind or changed: {sorted(set(after.items()) ^ set(before.items()))}"


ODD = ["nan", "inf", "-inf", "-1", "0", "1e30", "-1e30", "1e9", "2", "", "../no/such", "0.5", "True", "None", "a" * 300, "\udcff", "cuda:5", ":"]
PLAIN = {"train_tokenizer": "corpus.jsonl --vocab_size=300 --out_dir=new", "prepare_pretrain": PRE + "--val_fraction=0.1",
         "prepare_sft": CHAT + "--block_size=64 --val_fraction=0.2", "train": TRAIN + "--eval_iters=1", "eval": "--out_dir=out",
         "sample": "--out_dir=out --max_new_tokens=5", "chat": "--out_dir=out --prompt=你好 --max_new_tokens=5"}
LONG_RUNS = [("train", "max_iters", "1e9"), ("train", "compile", "True")]


@pytest.mark.slow
@pytest.mark.parametrize("program", PLAIN)
def test_every_flag_with_odd_values(project, tmp_path, program, capsys):
    """Each of 18 odd values for each flag: either it works, or one line and exit 2, with nothing left behind. Never a traceback, never a hang."""
    tried, refused, folder = 0, 0, tmp_path / "project"
    for field in dataclasses.fields(importlib.import_module(program).Settings):
        for value in ODD if field.default_factory is not list else ():
            if (program, field.name, value) in LONG_RUNS:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(project, folder)
            done = run_program(program, [*PLAIN[program].split(), f"--{field.name}={value}"], folder=folder)
            what = f"{program}.py --{field.name}={value}\n{done.out}{done.err}"
            assert done.status in (0, 2) and "Traceback" not in what, what
            tried, refused = tried + 1, refused + (done.status == 2)
            if done.status == 2:
                assert len(done.err.strip().splitlines()) == 1 and done.err.startswith(f"{program}.py: "), what
                assert tree(folder) == tree(project), what
    with capsys.disabled():
        print(f"\n{program}: {tried} flags with odd values, {refused} refused with one line, {tried - refused} understood")
    assert refused > tried / 3


def test_memory_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    """What numpy, torch and torch on a GPU say of it, is one line and exit 2; another RuntimeError keeps its traceback."""
    def no_room_on_the_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139 GiB. If reserved memory is large try ...")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for ask in (lambda: np.empty(10**17), lambda: torch.empty(10**17), no_room_on_the_gpu):
        with pytest.raises(SystemExit) as leave:
            run(ask)
        line = capsys.readouterr().err
        assert leave.value.code == 2 and re.fullmatch(r"train.py: out of memory \(.*allocate.*\): a smaller batch_size.*\n", line), line
    with pytest.raises(RuntimeError):
        run(lambda: torch.ones(2) @ torch.ones(3))


def test_a_file_name_that_is_not_utf8(project, tmp_path):
    """Names in GBK, as an archive made on Windows may hold: read, written to and named in meta.json; training takes it from there."""
    shutil.copytree(project, tmp_path / "project")
    here = os.fsencode(tmp_path / "project")
    os.rename(here + b"/corpus.jsonl", here + b"/" + "语料.jsonl".encode("gbk"))
    name, out = os.fsdecode("语料.jsonl".encode("gbk")), os.fsdecode("输出".encode("gbk"))
    for program, arguments in (("train_tokenizer", f"{name} --vocab_size=300 --out_dir=tok_{out}"),
                               ("prepare_pretrain", f"{name} --tokenizer=tok_{out} --val_fraction=0.1 --out_dir={out}"),
                               ("train", TRAIN + f"--data_dir={out} --out_dir=model_{out} --eval_iters=1"), ("eval", f"--out_dir=model_{out}")):
        done = run_program(program, arguments.split(), folder=tmp_path / "project")
        assert done.status == 0, done.out + done.err
    with open(tmp_path / "project" / out / "meta.json", encoding="utf-8") as file:
        assert json.load(file)["sources"] == [name]


def test_there_are_enough_of_them():
    assert len(ALL) >= 300 and set(CASES) == set(PROGRAMS) and all(len(CASES[program]) >= 8 for program in PROGRAMS)
