"""Preparation in the tests: a tokenizer made by hand, tiny corpora, the stage scripts in forked processes, token files read back.

A forked child has all modules loaded, so a run of a tiny corpus takes hundredths of a second; it is the
stage's own main(), with its own command line, in a process of its own that can be killed.
"""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

import prepare_pretrain
import prepare_sft
from minillm import tokenizer as tokenizer_module
import train_tokenizer
from minillm.errors import run
from support import ROOT

MERGES = ["的", "是", "在", "一", "人", "，", "。", "th", "the"]


def make_tokenizer(folder):
    """Bytes and a few merges, set by hand: it depends on no trainer. Returns the folder's path."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(tokenizer_module.SPECIAL_TOKENS + alphabet)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for word in MERGES:
        written = byte_level.pre_tokenize_str(word)[0][0]
        for end in range(1, len(written)):
            left, right = written[:end], written[end]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    backend = tokenizer_module.untrained()
    backend.model = models.BPE(vocabulary, merges)
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in tokenizer_module.SPECIAL_TOKENS])
    os.makedirs(folder)
    tokenizer_module.save(backend, folder)
    return str(folder)


def texts(count, start=0):
    """Distinct documents of varied length, by arithmetic alone."""
    return ["".join(chr(0x4E00 + (i * 7919 + j * j * 31 + j) % 2000) if j % 5 else "的，the。\n"[(i + j // 5) % 7] for j in range(5 + i * 13 % 90)) + str(i)
            for i in range(start, start + count)]


def chats(count, start=0):
    """Distinct conversations of one to three exchanges, as messages."""
    made = []
    for i in range(start, start + count):
        parts = iter(texts(6, i * 6))
        made.append([{"role": role, "content": next(parts)[: 3 + (i * 5 + n) % 40]} for n in range(1 + i % 3) for role in ("user", "assistant")])
        made[-1][0]["content"] += f"#{i}"
    return made


def belle(messages):
    return {"id": "", "conversations": [{"from": {"user": "human"}.get(m["role"], m["role"]), "value": m["content"]} for m in messages]}


def write_lines(path, records):
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return str(path)


def write_texts(path, items):
    return write_lines(path, ({"text": text} for text in items))


def write_chats(path, items):
    return write_lines(path, map(belle, items))


STAGES = {"train_tokenizer": train_tokenizer, "prepare_pretrain": prepare_pretrain, "prepare_sft": prepare_sft}


class Run:
    """A stage's main() in a forked child. before: a function called in the child first, to plant a fault."""

    def __init__(self, stage, argv, before=None):
        self.log, self.status = os.memfd_create("log"), None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(stage, list(map(str, argv)), before)

    def _child(self, stage, argv, before):
        status = 70
        try:
            os.dup2(self.log, 1), os.dup2(self.log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = [f"{stage}.py", *argv]
            os.environ["TOKENIZERS_PARALLELISM"] = "false"   # the library's threads, if this process had any, do not survive a fork
            if before:
                before()
            run(STAGES[stage].main)
            status = 0
        except SystemExit as leave:
            status = leave.code
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 1
        finally:
            try:
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(status)

    def wait(self, timeout=60):
        limit = time.monotonic() + timeout
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > limit:
                self.kill(), os.waitpid(self.pid, 0)
                raise AssertionError(f"did not end within {timeout} s:\n{self.output}")
            else:
                time.sleep(0.001)
        return self.status

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    @property
    def output(self):
        return os.pread(self.log, os.fstat(self.log).st_size, 0).decode(errors="replace")


def finish(stage, *argv, before=None):
    """Run to the end; returns what it printed. Fails unless it exits 0."""
    child = Run(stage, argv, before)
    assert child.wait() == 0, child.output
    return child.output


def refused(stage, *argv, before=None):
    """Returns the one line of the refusal. Fails unless it exits 2 without a traceback."""
    child = Run(stage, argv, before)
    assert child.wait() == 2, child.output
    assert child.output.count("\n") == 1 and child.output.startswith(f"{stage}.py: "), child.output
    return child.output


def command(stage, *argv, env=None):
    """The script as a user starts it; returns what it printed."""
    result = subprocess.run([sys.executable, "-m", stage, *map(str, argv)], cwd=ROOT, text=True, capture_output=True, env=os.environ | (env or {}))
    assert result.returncode == 0, result.stderr
    return result.stdout


def meta(folder):
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
        return json.load(file)


def fingerprint(folder):
    """{name: sha256} of the token files in a folder (or of any files); {} where there is no folder."""
    if not os.path.isdir(folder):
        return {}
    prints = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            prints[name] = hashlib.sha256(file.read()).hexdigest()
    return prints


def read_documents(folder, split):
    """The documents of a pretraining split, in order, as lists of ids without their <|endoftext|>."""
    ids = np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").tolist()
    assert not ids or ids[-1] == tokenizer_module.END_OF_TEXT
    found, current = [], []
    for id in ids:
        if id == tokenizer_module.END_OF_TEXT:
            found.append(current)
            current = []
        else:
            current.append(id)
    return found


def read_rows(folder, split, capacity):
    """The rows of an SFT split: for each a list of (ids, mask), a conversation each, its <|endoftext|> cut off, and the padding's length."""
    tokens = np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").reshape(-1, capacity).tolist()
    masks = np.fromfile(os.path.join(folder, f"{split}_mask.bin"), "u1").reshape(-1, capacity).tolist()
    rows = []
    for row, mask in zip(tokens, masks):
        found, start = [], 0
        while start < capacity and row[start] != tokenizer_module.END_OF_TEXT:
            end = row.index(tokenizer_module.END_OF_TEXT, start)         # ValueError: a conversation that runs out of its row
            found.append((row[start:end], mask[start:end]))
            assert mask[end] == 0
            start = end + 1
        assert not any(row[start:]) and not any(mask[start:])
        rows.append((found, capacity - start))
    return rows
