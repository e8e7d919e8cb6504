"""Which windows a step learns from.

A pure function of (seed, step, global batch), for any number of processes.
"""
import json
import os
import tracemalloc

import numpy as np
import pytest

from minillm import dataloader as data
import train
from minillm.dataloader import TokenData, batch_windows, permute
from support.training_runs import TINY, finish, make_data, ranks


@pytest.mark.parametrize("n", [*range(1, 130), 255, 256, 257, 1000, 4097, 65535, 65537, 100_003])
def test_permutation_is_a_bijection(n):
    for key in (0, 1, 2**63 - 1):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permutation_of_a_billion():
    """Neighbours at any place of a domain too large to list go to distinct places inside it."""
    n = 10**9
    for start in (0, n // 3, n - 200_000):
        image = permute(np.arange(start, start + 200_000), n, 12345)
        assert image.min() >= 0 and image.max() < n and len(np.unique(image)) == len(image)


def test_permutation_looks_random():
    n = 20_000
    image = permute(np.arange(n), n, 7)
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.03
    # of two independent uniform places
    assert abs(np.abs(np.diff(image)).mean() / n - 1 / 3) < 0.01
    # fixed points: 1 is expected
    assert (image == np.arange(n)).sum() < 10
    # where one window stands in 400 epochs: uniform over ten tenths of the epoch
    places = np.array([permute([17], 500, key)[0] for key in range(400)])
    counts = np.bincount(places * 10 // 500, minlength=10)
    # chi-square, 9 degrees of freedom, p = 0.001
    assert ((counts - 40) ** 2 / 40).sum() < 27.9


@pytest.fixture
def positions(tmp_path):
    """A corpus whose tokens are their own positions.

    600 windows of 100 tokens, and the one after.
    """
    meta = {"kind": "pretrain", "tokenizer": "none", "tokenizer_hash": "", "vocab_size": 65535,
            "splits": {}}
    for split, count in (("train", 60_001), ("val", 1_001)):
        np.arange(count, dtype="<u2").tofile(tmp_path / f"{split}.bin")
        meta["splits"][split] = {"tokens": count}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return TokenData(str(tmp_path), "train", 100)


def test_an_epoch_holds_every_token_once(positions):
    batch = 24                                   # 25 steps are one epoch
    assert positions.n_windows == 600
    first = [positions.windows(batch_windows(3, step, batch, 600)) for step in range(25)]
    inputs = np.concatenate([x.numpy().ravel() for x, _ in first])
    assert np.array_equal(np.sort(inputs), np.arange(60_000))
    assert all((y == x + 1).all() for x, y in first)
    second = [positions.windows(batch_windows(3, step, batch, 600)) for step in range(25, 50)]
    second = np.concatenate([x.numpy().ravel() for x, _ in second])
    assert np.array_equal(np.sort(second), np.arange(60_000))
    assert not np.array_equal(inputs, second)
    one, other = (np.concatenate([batch_windows(seed, step, batch, 600) for step in range(25)])
                  for seed in (3, 4))
    assert not np.array_equal(one, other)


def test_batches_run_on_into_the_next_epoch():
    """A batch that doesn't divide the epoch loses and repeats nothing.

    Three epochs are three permutations.
    """
    stream = np.concatenate([batch_windows(0, step, 16, 100) for step in range(20)])
    stream = stream[:300].reshape(3, 100)
    assert np.array_equal(np.sort(stream, axis=1), np.tile(np.arange(100), (3, 1)))
    # nor does a batch larger than the corpus
    assert np.array_equal(np.bincount(batch_windows(0, 0, 35, 7)), np.full(7, 5))


def record_windows(folder):
    """In the child: write down the windows that every call for training data asks for."""
    def before():
        inner, rank = TokenData.windows, os.environ.get("RANK", "0")

        def windows(self, indices):
            if self.split == "train":
                with open(os.path.join(folder, f"windows_{rank}"), "a") as file:
                    file.write(json.dumps([int(i) for i in indices]) + "\n")
            return inner(self, indices)
        train.TokenData.windows = windows
    return before


@pytest.mark.parametrize("world, batch_size, accumulation", [
    (1, 16, 1), (1, 2, 8), (2, 4, 4), (4, 2, 8), (8, 1, 16)])
def test_every_world_size_sees_the_same_batches(tmp_path, world, batch_size, accumulation):
    """train.py itself, as 1, 2, 4 and 8 gloo processes.

    What they read, put together, is the same 3 global batches.
    """
    data = make_data(tmp_path / "data")
    argv = [*TINY, f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}",
            "--max_iters=3", "--eval_interval=0", "--checkpoint_interval=0", f"--data_dir={data}",
            f"--out_dir={tmp_path}/out", "--n_layer=1"]
    if world == 1:
        finish(argv, before=record_windows(tmp_path))
    else:
        children = ranks(world, argv, before=[record_windows(tmp_path)] * world)
        assert [child.wait() for child in children] == [0] * world, children[0].output
    per_rank = []
    for rank in range(world):
        with open(tmp_path / f"windows_{rank}") as file:
            per_rank.append([json.loads(line) for line in file])
    micro_steps = accumulation // world
    for step in range(3):
        batch = []
        for micro in range(micro_steps):
            for rank in range(world):
                batch += per_rank[rank][step * micro_steps + micro]
        assert batch == batch_windows(1337, step, 16, 124).tolist()
    assert all(len(calls) == 3 * micro_steps for calls in per_rank)


def test_resuming_continues_with_the_next_batch(tmp_path):
    data = make_data(tmp_path / "data")
    argv = [*TINY, "--eval_interval=0", "--checkpoint_interval=0", f"--data_dir={data}",
            "--n_layer=1"]
    for name, parts in [
        ("straight", [["--max_iters=9"]]),
        ("parted", [["--max_iters=4"], ["--max_iters=9", "--init_from=resume"]]),
    ]:
        os.mkdir(tmp_path / name)
        for part in parts:
            finish([*argv, *part, f"--out_dir={tmp_path}/{name}/out"],
                   before=record_windows(tmp_path / name))
    straight, parted = ((tmp_path / name / "windows_0").read_text()
                        for name in ("straight", "parted"))
    assert straight == parted


def open_and_draw(folder, tokens):
    """Open a corpus of `tokens` tokens (holes in a sparse file) and draw a late batch.

    (windows, memory at its peak in bytes).
    """
    meta = {"kind": "pretrain", "tokenizer": "none", "tokenizer_hash": "", "vocab_size": 300,
            "splits": {"train": {"tokens": tokens}, "val": {"tokens": 0}}}
    os.mkdir(folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    with open(folder / "train.bin", "wb") as file:
        try:
            file.truncate(2 * tokens)
        except OSError:
            pytest.skip("no room for a sparse file of 16 GB here")
    tracemalloc.start()
    corpus = TokenData(str(folder), "train", 8)
    x, _ = corpus.windows(batch_windows(1, 10**6, 512, corpus.n_windows))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.shape == (512, 8)
    return corpus.n_windows, peak


def test_a_billion_windows_cost_no_more_than_a_few(tmp_path, monkeypatch):
    """16 GB of tokens.

    As much memory as for 1.6 MB, and at the start a bounded number of tokens read.
    """
    monkeypatch.setattr(data, "CHECKED_AT_START", 4)         # what holds for 64 holds for 4
    read = []
    inner = TokenData._check_ids

    def check_ids(self, tokens, start):
        read.append(len(tokens))
        inner(self, tokens, start)
    monkeypatch.setattr(TokenData, "_check_ids", check_ids)
    few, small = open_and_draw(tmp_path / "few", 8 * 10**5 + 1)
    many, large = open_and_draw(tmp_path / "many", 8 * 10**9 + 1)
    assert (few, many) == (10**5, 10**9)
    assert large < small + 100_000, (small, large)
    # four chunks; the small file and the windows that are drawn are less than one
    assert sum(read) <= 5 * data.CHUNK, sum(read)
