"""MergeTable finds the rank of every merge, however many share a slot."""
import itertools

import numpy as np
import pytest

from minillm.speed.merge_table import MergeTable, merges_of

LETTERS = "abcdefgh"


def model(merges):
    """The model part of a tokenizer.json with single letters and these merges."""
    texts = [*LETTERS, *(left + right for left, right in merges)]
    return {"vocab": {text: number for number, text in enumerate(texts)}, "merges": merges}


@pytest.mark.parametrize("bits", [6, 7, 18])
def test_every_pair_has_its_rank_and_every_other_none(monkeypatch, bits):
    """60 merges in 64 slots: most are not where they belong, and some go around the end."""
    monkeypatch.setattr(MergeTable, "BITS", bits)
    pairs = [list(pair) for pair in itertools.product(LETTERS, repeat=2)]
    merges = pairs[::-1][:60]
    table = MergeTable(model(merges))
    expected = {tuple(pair): rank for rank, pair in enumerate(merges)}

    first, second = (np.array([LETTERS.index(pair[side]) for pair in pairs]) for side in (0, 1))
    ranks = table.rank(first, second).tolist()

    assert ranks == [expected.get(tuple(pair), table.none) for pair in pairs]
    found = [rank for rank in ranks if rank != table.none]
    assert sorted(table.merged[found].tolist()) == list(range(len(LETTERS), len(LETTERS) + 60))


def test_a_merge_may_be_written_as_one_string():
    assert merges_of({"merges": ["a b", ["b", "c"]]}) == [["a", "b"], ["b", "c"]]
