"""Packing conversations into rows: best-fit decreasing by its definition, near the optimum."""
import math
import random
import resource
import struct

import numpy as np
import pytest

from minillm import packing
from minillm.documents import Document, columns
from minillm.packing import pack
from minillm.tokenizer import END_OF_TEXT


def naive_best_fit_decreasing(lengths, capacity):
    """The room that each row has left, by the definition of the algorithm, in quadratic time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return rooms


def fewest_rows(lengths, capacity):
    """A number of rows below which no packing can go: L2 of Martello and Toth (1990)."""
    best = 0
    for small in range(capacity // 2 + 1):
        # nothing that counts fits beside these: a row each
        alone = [length for length in lengths if length > capacity - small]
        # no two of these fit together: a row each
        half = [length for length in lengths if capacity / 2 < length <= capacity - small]
        rest = [length for length in lengths if small <= length <= capacity / 2]
        room = len(half) * capacity - sum(half)
        more = max(0, math.ceil((sum(rest) - room) / capacity))
        best = max(best, len(alone) + len(half) + more)
    return best


LENGTHS = {
    "any": lambda capacity: (1, capacity),
    "short": lambda capacity: (1, max(1, capacity // 4)),
    "long": lambda capacity: (capacity // 3, capacity),
}
CASES = [(1, "any"), (7, "any"), (64, "any"), (64, "short"), (64, "long"), (513, "any"),
         (513, "short")]


@pytest.mark.parametrize("capacity, lengths", CASES)
@pytest.mark.parametrize("count", [0, 1, 2, 10, 400])
def test_pack(capacity, lengths, count):
    rng = random.Random(capacity + count)
    low, high = LENGTHS[lengths](capacity)
    lengths = [rng.randint(low, high) for _ in range(count)]

    rows = pack(lengths, capacity)

    assert sorted(item for row in rows for item in row) == list(range(count))
    rooms = [capacity - sum(lengths[item] for item in row) for row in rows]
    assert all(room >= 0 for room in rooms)
    assert sorted(rooms) == sorted(naive_best_fit_decreasing(lengths, capacity))
    fewest = fewest_rows(lengths, capacity)
    assert fewest <= len(rows) <= 11 / 9 * fewest + 4


def test_equal_lengths_keep_their_order():
    """So that every machine packs the same rows, whatever sort its numpy has."""
    assert pack([5] * 1000 + [7] * 1000, 7) == [[1000 + i] for i in range(1000)] + [
        [i] for i in range(1000)]


def test_conversations_of_several_pools_are_all_written(tmp_path, monkeypatch):
    """More than are packed at once, and rows more than are written at once."""
    monkeypatch.setattr(packing, "POOL_TOKENS", 50)
    monkeypatch.setattr(packing, "ROWS_WRITTEN", 3)
    capacity, lengths = 8, [2 + i % 6 for i in range(100)]           # with <|endoftext|>
    writer = packing.RowWriter(str(tmp_path), "train", capacity)

    for i, length in enumerate(lengths):
        tokens = struct.pack(f"<{length - 1}H", *[100 + i] * (length - 1))
        payload = packing.to_payload([tokens], [b"\1" * (length - 1)], supervised_bytes=3)
        writer.add(columns([Document(bytes(16), 10, payload, "")]))
    writer.close()

    found = np.fromfile(tmp_path / "train.bin", "<u2")
    mask = np.fromfile(tmp_path / "train_mask.bin", "u1")
    values, counts = np.unique(found[found != END_OF_TEXT], return_counts=True)
    assert dict(zip(values - 100, counts)) == {i: n - 1 for i, n in enumerate(lengths)}
    assert (mask == (found != END_OF_TEXT)).all()
    assert len(found) == writer.counts["rows"] * capacity == writer.counts["tokens"]
    assert writer.counts["padding_tokens"] == len(found) - sum(lengths)
    assert (writer.counts["documents"], writer.counts["bytes"]) == (100, 1000)
    assert (writer.counts["learned_bytes"], writer.counts["learned_tokens"]) == (300, mask.sum())


@pytest.mark.slow
def test_ten_times_the_conversations_take_the_same_memory(tmp_path):
    """RowWriter on simulated lengths, up to ten million."""
    capacity, peaks, payloads = 513, [], [b""]
    for length in range(capacity):
        payloads.append(packing.to_payload([bytes(2 * length)], [bytes(length)], 1))
    for name in ("train.bin", "train_mask.bin"):
        (tmp_path / name).symlink_to("/dev/null")
    for count in (1_000_000, 10_000_000):
        rng = np.random.default_rng(0)
        lengths = np.minimum(capacity, 20 + rng.lognormal(4.6, 0.8, count)).astype(int).tolist()
        writer = packing.RowWriter(str(tmp_path), "train", capacity)
        for start in range(0, count, 1000):
            some = lengths[start: start + 1000]
            writer.add(columns([Document(bytes(16), 1, payloads[length], "") for length in some]))
        writer.close()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        padding = writer.counts["padding_tokens"] / writer.counts["tokens"]
        print(f"{count:,} conversations: peak {peaks[-1]:.0f} MiB, padding {padding:.3%}")

    assert peaks[1] < peaks[0] + 700         # the list of lengths takes 400 of it
    assert padding < 0.03
