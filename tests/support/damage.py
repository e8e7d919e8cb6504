"""Ways to damage files, and the damage that a case of bad input plans for later."""
import functools
import importlib.util
import json
import os
import shutil

import numpy as np
import pytest


def truncate(path, share):
    """Leave the first `share` of a file."""
    os.truncate(path, int(os.path.getsize(path) * share))


def flip(path, share, bit=3):
    """Flip one bit of the byte that stands at `share` of a file's length."""
    with open(path, "r+b") as file:
        file.seek(int(os.path.getsize(path) * share))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))


# ---- planned: each call returns a function that does it

def planned(damage):
    """Called with the arguments of `damage`, returns a function that does it with them."""
    @functools.wraps(damage)
    def plan(*args, **kwargs):
        return functools.partial(damage, *args, **kwargs)
    return plan


cut = planned(truncate)
flip_bit = planned(flip)
make = planned(os.makedirs)


@planned
def put(path, content):
    """Write a file of text or bytes."""
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


@planned
def link(target, path):
    os.symlink(target, path)


@planned
def append(path, content):
    with open(path, "ab") as file:
        file.write(content)


@planned
def remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


@planned
def forbid(path):
    """Take away the right to read."""
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    os.chmod(path, 0)


@planned
def each(*steps):
    for step in steps:
        step()


# ---- token files

@planned
def put_token(path, place, id, dtype="<u2"):
    tokens = np.fromfile(path, dtype)
    tokens[place] = id
    tokens.tofile(path)


@planned
def cut_token(path):
    """Take away the last token."""
    os.truncate(path, os.path.getsize(path) - 2)


@planned
def zero(path):
    """Nothing but zeros, of the same length."""
    length = os.path.getsize(path)
    with open(path, "wb") as file:
        file.write(bytes(length))


def _change(folder, change):
    path = os.path.join(folder, "meta.json")
    with open(path) as file:
        content = json.load(file)
    change(content)
    with open(path, "w") as file:
        json.dump(content, file)


@planned
def meta(folder, **changes):
    """Change keys of <folder>/meta.json; None takes one away."""
    def change(content):
        for key, value in changes.items():
            if value is None:
                del content[key]
            else:
                content[key] = value
    _change(folder, change)


@planned
def count(folder, split, tokens=None):
    """Let <folder>/meta.json count so many tokens in a split; None: as many as there are."""
    def change(content):
        there = os.path.getsize(os.path.join(folder, f"{split}.bin")) // 2
        content["splits"][split]["tokens"] = there if tokens is None else tokens
    _change(folder, change)


@planned
def uncounted(folder, key):
    """Take a count away from every split in <folder>/meta.json."""
    def change(content):
        for counts in content["splits"].values():
            del counts[key]
    _change(folder, change)


# ---- what a machine must lack

def no_wandb():
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
