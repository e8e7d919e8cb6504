"""Preparation in the tests: tiny corpora, the stages run on them, token files read back."""
import hashlib
import json
import os
import subprocess
import sys

import numpy as np

from minillm.tokenizer import END_OF_TEXT
from support import ROOT, processes


def texts(count, start=0):
    """Distinct documents of varied length, by arithmetic alone."""
    made = []
    for i in range(start, start + count):
        characters = []
        for j in range(5 + i * 13 % 90):
            if j % 5:
                characters.append(chr(0x4E00 + (i * 7919 + j * j * 31 + j) % 2000))
            else:
                characters.append("的，the。\n"[(i + j // 5) % 7])
        made.append("".join(characters) + str(i))
    return made


def chats(count, start=0):
    """Distinct conversations of one to three exchanges, as messages."""
    made = []
    for i in range(start, start + count):
        parts = iter(texts(6, i * 6))
        messages = []
        for n in range(1 + i % 3):
            length = 3 + (i * 5 + n) % 40
            messages += [{"role": "user", "content": next(parts)[:length]},
                         {"role": "assistant", "content": next(parts)[:length]}]
        messages[0]["content"] += f"#{i}"
        made.append(messages)
    return made


def belle(messages):
    turns = []
    for message in messages:
        role = "human" if message["role"] == "user" else message["role"]
        turns.append({"from": role, "value": message["content"]})
    return {"id": "", "conversations": turns}


def text_line(text):
    """The bytes of a document in a file of JSON lines."""
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def write_lines(path, records):
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return str(path)


def write_texts(path, items):
    return write_lines(path, ({"text": text} for text in items))


def write_chats(path, items):
    return write_lines(path, map(belle, items))


def finish(stage, *argv, before=None):
    """Run to the end; returns what it printed. Fails unless it exits 0."""
    return processes.finish(stage, argv, before=before)


def refused(stage, *argv, before=None):
    """Returns the one line of the refusal. Fails unless it is all that the stage printed."""
    child = processes.run(stage, argv, before=before)
    assert child.status == 2, child.output
    assert child.output.count("\n") == 1, child.output
    assert child.output.startswith(f"{stage}.py: "), child.output
    return child.output


def command(stage, *argv, env=None):
    """The script as a user starts it; returns what it printed."""
    result = subprocess.run([sys.executable, "-m", stage, *map(str, argv)], cwd=ROOT, text=True,
                            capture_output=True, env=os.environ | (env or {}))
    assert result.returncode == 0, result.stderr
    return result.stdout


def peak_memory(stage, *argv):
    """GiB that a stage takes in a process of its own."""
    output = command("bench.data", "--measure", stage, *argv)
    return json.loads(output.splitlines()[-1])["peak"] / 2**30


def meta(folder):
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
        return json.load(file)


def fingerprint(folder):
    """{name: sha256} of the token files in a folder (or of any files).

    {} where there is no folder.
    """
    if not os.path.isdir(folder):
        return {}
    prints = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            prints[name] = hashlib.sha256(file.read()).hexdigest()
    return prints


def read_documents(folder, split):
    """The documents of a pretraining split, in order: lists of ids without <|endoftext|>."""
    ids = np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").tolist()
    assert not ids or ids[-1] == END_OF_TEXT
    found, current = [], []
    for id in ids:
        if id == END_OF_TEXT:
            found.append(current)
            current = []
        else:
            current.append(id)
    return found


def read_rows(folder, split, capacity):
    """The rows of an SFT split: for each ([(ids, mask) of a conversation], length of the padding).

    The <|endoftext|> of a conversation is cut off.
    """
    tokens = np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2").reshape(-1, capacity)
    masks = np.fromfile(os.path.join(folder, f"{split}_mask.bin"), "u1").reshape(-1, capacity)
    rows = []
    for row, mask in zip(tokens.tolist(), masks.tolist()):
        found, start = [], 0
        while start < capacity and row[start] != END_OF_TEXT:
            end = row.index(END_OF_TEXT, start)      # ValueError: the conversation has no end
            found.append((row[start:end], mask[start:end]))
            assert mask[end] == 0
            start = end + 1
        assert not any(row[start:]) and not any(mask[start:])
        rows.append((found, capacity - start))
    return rows
