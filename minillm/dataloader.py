"""Token files, and which of their windows are the batch of a step: the order of the data.

The batch of a step is a pure function of (seed, step, global batch size). An epoch is a
pseudo-random permutation of all windows, computed window by window, so neither memory nor start-up
grows with the corpus, resuming needs nothing but the step number, and any number of processes sees
the same data in the same order.
"""
import hashlib
import itertools
import math
import mmap
import os

import numpy as np
import torch

from minillm.errors import UserError
from minillm.shuffle import scramble
from minillm.token_files import read_meta

CHUNK = 1 << 20                      # how many tokens are checked at once
CHECKED_AT_START = 64                # chunks at most; of longer files every second, third … chunk


class TokenData:
    """One split ("train" or "val") of a folder that prepare_pretrain.py or prepare_sft.py wrote.

    A window is block_size tokens and the one after them. Pretraining windows lie side by side in
    the stream; an SFT window is one row of the file, and only tokens with mask 1 are targets.
    Raises UserError where the files, meta.json and `block_size` contradict each other. The files
    are mapped: they may be replaced meanwhile, but truncating one in place kills (SIGBUS).
    """

    def __init__(self, folder, split, block_size):
        self.folder, self.split, self.block_size = folder, split, block_size
        self.meta = read_meta(folder)
        self.path = os.path.join(folder, f"{split}.bin")
        sft = self.meta["kind"] == "sft"
        self.tokens = _map(self.path, np.dtype("<u2"))
        holds = f"{self.path} holds {len(self.tokens):,} tokens"
        mask_path = f"{folder}/{split}_mask.bin"
        self.loss_mask = _map(mask_path, np.dtype("u1")) if sft else None
        stated = self.meta["splits"][split]["tokens"]
        if stated != len(self.tokens):
            raise UserError(f"{holds}, but {folder}/meta.json says {stated:,}: prepare it again")
        if sft and len(self.loss_mask) != len(self.tokens):
            raise UserError(f"{mask_path} has {len(self.loss_mask):,} entries for "
                            f"{len(self.tokens):,} tokens: prepare it again")
        if sft and self.meta["block_size"] != block_size:
            packed = self.meta["block_size"]
            raise UserError(f"{folder} was packed for block_size={packed}, not {block_size}: "
                            f"give train.py --block_size={packed}, or prepare_sft.py "
                            f"--block_size={block_size}")
        if sft:
            self.stride = block_size + 1
            self.n_windows = len(self.tokens) // self.stride
            if len(self.tokens) % self.stride:
                raise UserError(f"{holds}, not whole rows of {self.stride}: prepare it again")
        else:
            self.stride = block_size
            self.n_windows = (len(self.tokens) - 1) // self.stride
        if self.n_windows < 1:
            hint = ": give a smaller --block_size, or prepare more text"
            if split == "val":
                hint = (": prepare with a larger --val_fraction, or leave validation out, with "
                        "train.py --eval_interval=0, eval.py --data_dir=none")
            raise UserError(f"{holds}, fewer than one window of {block_size + 1}{hint}")
        # a bad id would index past the embedding; every batch is checked too, see windows()
        chunks = range(0, len(self.tokens), CHUNK)
        every = math.ceil(len(chunks) / CHECKED_AT_START)
        for start in chunks[::every]:
            self._check_ids(self.tokens[start: start + CHUNK], start)
            if sft and self.loss_mask[start: start + CHUNK].max() > 1:
                raise UserError(f"{mask_path} holds other values than 0 and 1: prepare it again")
        if sft and not any(self.loss_mask[start: start + CHUNK].any() for start in chunks):
            raise UserError(f"{mask_path} marks no token as supervised: "
                            "there is nothing to train or to score")
        # Windows are read in random order, so what the system reads ahead is not used for hours.
        # Without read-ahead, windows of 513 tokens come from a cold disk ten times as fast (11,000
        # per second instead of 1,000)
        if hasattr(mmap, "MADV_RANDOM"):
            for array in (self.tokens, self.loss_mask):
                if array is not None:
                    array._mmap.madvise(mmap.MADV_RANDOM)

    def _check_ids(self, tokens, start):
        if tokens.max() >= self.meta["vocab_size"]:
            at = int((tokens >= self.meta["vocab_size"]).argmax())
            raise UserError(f"{self.path}: token {start + at:,} is {tokens[at]}, "
                            f"outside the vocabulary of {self.meta['vocab_size']:,}")

    def windows(self, indices):
        """x and y of some windows: int64 (len(indices), block_size); y is -1 without a target."""
        x = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            start = int(index) * self.stride
            x[row] = self.tokens[start: start + self.block_size + 1]
            self._check_ids(x[row], start)
        y = x[:, 1:].copy()
        if self.loss_mask is not None:
            for row, index in enumerate(indices):
                start = int(index) * self.stride
                y[row][self.loss_mask[start + 1: start + self.block_size + 1] == 0] = -1
        return torch.from_numpy(np.ascontiguousarray(x[:, :-1])), torch.from_numpy(y)


def _map(path, dtype):
    try:
        size = os.path.getsize(path)
        if size % dtype.itemsize:
            raise UserError(f"{path} has {size:,} bytes, "
                            f"not a whole number of {dtype.itemsize}-byte tokens: it is damaged")
        return np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; "
                        "prepare_pretrain.py and prepare_sft.py make it") from None


def permute(indices, n, key):
    """Where a pseudo-random permutation of range(n) sends each of `indices`. O(1) memory for any n.

    A four-round Feistel network is a bijection of range(p), where p is a power of 4 and at least n.
    A value outside range(n) is mapped again until it is inside ("cycle walking", Black and Rogaway
    2002), so that all in all it is a bijection of range(n). indices: integers in [0, n); key: any
    integer. Returns int64.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = scramble(np.arange(4, dtype=np.uint64) ^ np.uint64(key & (2**64 - 1))).tolist()
    x = np.asarray(indices, dtype=np.uint64).copy()
    pending = np.ones(x.shape, dtype=bool)
    with np.errstate(over="ignore"):
        while pending.any():
            left, right = x[pending] >> half, x[pending] & low
            for k in keys:
                left, right = right, left ^ (scramble(right ^ np.uint64(k)) & low)
            x[pending] = (left << half) | right
            pending = x >= np.uint64(n)
    return x.astype(np.int64)


def batch_windows(seed, step, batch, n_windows):
    """The windows of global batch `step`: an array of `batch` indices.

    Epoch e is a permutation whose key is (seed, e). The batches take its windows one after the
    other, and the last batch of an epoch is completed from the next.
    """
    position = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epoch = position // n_windows
    windows = np.empty(batch, dtype=np.int64)
    for e in np.unique(epoch):
        inside = epoch == e
        key = derive_seed(seed, int(e))
        windows[inside] = permute(position[inside] % n_windows, n_windows, key)
    return windows


def rank_batches(data, seed, step, batch_size, micro_steps, rank, world):
    """One rank's share of the windows of a step: [(x, y)], and how many tokens are supervised.

    Micro-batch m of rank r is slice m * world + r of the global batch. micro_steps: of all ranks
    together. x and y: int64 (batch_size, block_size).
    """
    windows = batch_windows(seed, step, batch_size * micro_steps, data.n_windows)
    batches = [data.windows(rows) for rows in windows.reshape(-1, batch_size)[rank::world]]
    # counted on the host: counting on the GPU would need a sync
    n_supervised = sum((y >= 0).sum().item() for _, y in batches)
    return batches, n_supervised


def show_windows(data, windows, tokenizer):
    """Print windows as text, the supervised tokens of SFT between ⟦ and ⟧."""
    lines = []
    for window in windows:
        _, targets = data.windows([window])
        supervised = [False] + (targets[0] >= 0).tolist()
        lines.append(f"--- window {window}: {sum(supervised)} supervised tokens")
        is_sft = data.loss_mask is not None
        marked = supervised if is_sft else [False] * len(supervised)
        tokens = data.tokens[int(window) * data.stride:][: len(supervised)].tolist()
        text = ""
        for mark, run in itertools.groupby(zip(marked, tokens), key=lambda pair: pair[0]):
            piece = tokenizer.decode([token for _, token in run], skip_special=False)
            text += f"⟦{piece}⟧" if mark else piece
        lines.append(text)
    print("\n".join(lines))                      # at once: `| head` may leave before the end


def derive_seed(*parts):
    """One 63-bit seed from several integers and names."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
