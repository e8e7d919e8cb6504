"""Packing conversations into rows of equal length, and writing the rows.

    payload = to_payload(tokens, masks, supervised_bytes)    # of one conversation
    writer = RowWriter("data/sft", "train", capacity=513)
    writer.add(documents)                                # Documents with such payloads
    writer.close()
"""
import os
import struct

import numpy as np

from minillm.tokenizer import END_OF_TEXT, pack_ids

# keys in meta.json. "tokens" includes the padding; "learned" means supervised
COUNTS = ("documents", "tokens", "bytes", "learned_tokens", "learned_bytes", "rows", "padding_tokens")
POOL_TOKENS = 1 << 24                # tokens packed at once: 48 MiB with their mask
ROWS_WRITTEN = 1000                  # rows written at once
# a payload begins with the number of UTF-8 bytes of the supervised contents
_SUPERVISED_BYTES = struct.Struct("<Q")
_END = pack_ids([END_OF_TEXT])


def to_payload(tokens, masks, supervised_bytes):
    """The payload of a conversation, bytes: the number, the tokens with <|endoftext|>, the mask.

    tokens: the packed ids of each turn, uint16; masks: the loss mask of each, a byte per token.
    """
    return b"".join([_SUPERVISED_BYTES.pack(supervised_bytes), *tokens, _END, *masks, b"\0"])


def pack(lengths, capacity):
    """Best-fit decreasing (Johnson 1974) of items into rows: lists of item indices.

    Every item, the longest first, goes into the fullest row with room for it. Rows are kept in
    lists by the room they have left; bit r of `rooms` says whether some row has room r. So after
    the sort, each item takes a few operations on one integer of `capacity` bits. The same lengths
    always give the same rows. No length may exceed `capacity`.
    """
    rows, by_room, rooms = [], [[] for _ in range(capacity + 1)], 0
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    for item in order:
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            # fitting & -fitting is its lowest set bit: the smallest room that is large enough
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(item)
        room -= length
        by_room[room].append(row)
        rooms |= 1 << room
    return rows


class RowWriter:
    """One split: collects conversations into a pool, packs it, and writes its rows."""

    def __init__(self, folder, name, capacity):
        self._tokens = open(os.path.join(folder, f"{name}.bin"), "wb", 1 << 20)
        self._mask = open(os.path.join(folder, f"{name}_mask.bin"), "wb", 1 << 20)
        self._capacity = capacity
        # payloads, their lengths in tokens, and the sum of these
        self._pool, self._lengths, self._pool_tokens = [], [], 0
        self.counts = dict.fromkeys(COUNTS, 0)

    def add(self, documents):
        payloads = documents.payloads
        self.counts["documents"] += len(payloads)
        self.counts["bytes"] += int(documents.sizes.sum())
        self.counts["learned_bytes"] += sum(_SUPERVISED_BYTES.unpack_from(payload)[0]
                                            for payload in payloads)
        for payload in payloads:
            # two bytes per token, and one of the mask
            length = (len(payload) - _SUPERVISED_BYTES.size) // 3
            self._pool.append(bytes(payload))            # a copy, so that its bucket can go
            self._lengths.append(length)
            self._pool_tokens += length
            if self._pool_tokens >= POOL_TOKENS:
                self._write_pool()

    def _write_pool(self):
        rows = pack(self._lengths, self._capacity)
        for start in range(0, len(rows), ROWS_WRITTEN):
            self._write_rows(rows[start: start + ROWS_WRITTEN])
        self.counts["rows"] += len(rows)
        self.counts["tokens"] += len(rows) * self._capacity
        self.counts["padding_tokens"] += len(rows) * self._capacity - self._pool_tokens
        self._pool, self._lengths, self._pool_tokens = [], [], 0

    def _write_rows(self, rows):
        tokens, masks = [], []                   # pieces of the two files
        for row in rows:
            padding = self._capacity
            for item in row:
                payload, length = self._pool[item], self._lengths[item]
                middle = _SUPERVISED_BYTES.size + 2 * length
                tokens.append(payload[_SUPERVISED_BYTES.size: middle])
                masks.append(payload[middle:])
                padding -= length
            tokens.append(padding * _END)
            masks.append(bytes(padding))
        mask = b"".join(masks)
        self.counts["learned_tokens"] += mask.count(1)
        self._tokens.write(b"".join(tokens))
        self._mask.write(mask)

    def close(self):
        self._write_pool()
        self._tokens.close()
        self._mask.close()
