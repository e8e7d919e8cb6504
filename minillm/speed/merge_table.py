"""The merges of BPE in numpy: the ranks of many pairs of tokens at once.

    table = MergeTable(json.loads(backend.to_str())["model"])
    rank = table.rank(first, second)             # arrays of tokens; table.none: not a merge
    token = table.merged[rank]
"""
import numpy as np


class MergeTable:
    """The merges of BPE as a hash table in arrays: rank(first, second) of pairs of tokens.

    `merged` is the token of each rank; `none` is the rank of a pair that does not merge.
    """
    BITS = 18                        # 4 slots or more for each of at most 65,535 merges
    FREE = np.uint32(2**32 - 1)

    def __init__(self, model):
        vocabulary = model["vocab"]
        merges = merges_of(model)
        first = np.array([vocabulary[left] for left, _ in merges], np.uint32)
        second = np.array([vocabulary[right] for _, right in merges], np.uint32)
        self.merged = np.array([vocabulary[left + right] for left, right in merges], np.int32)
        self.none = len(merges)
        self._keys = np.full(1 << self.BITS, self.FREE)
        self._ranks = np.full(1 << self.BITS, self.none, np.int32)
        keys = first << np.uint32(16) | second
        for rank, (key, slot) in enumerate(zip(keys.tolist(), self._slot(keys).tolist())):
            while self._keys[slot] != self.FREE:
                slot = (slot + 1) % len(self._keys)
            self._keys[slot] = key
            self._ranks[slot] = rank

    def _slot(self, keys):
        return keys * np.uint32(2654435761) >> np.uint32(32 - self.BITS)     # Knuth

    def rank(self, first, second):
        """The rank of each pair, `none` where there is no such merge."""
        keys = first.astype(np.uint32) << np.uint32(16) | second.astype(np.uint32)
        slots = self._slot(keys)
        found = self._keys[slots]
        rank = np.where(found == keys, self._ranks[slots], self.none)
        missed = np.flatnonzero((found != keys) & (found != self.FREE))
        while len(missed):                               # another pair's slot: look into the next
            slots[missed] = (slots[missed] + 1) % len(self._keys)
            found = self._keys[slots[missed]]
            is_it = found == keys[missed]
            rank[missed[is_it]] = self._ranks[slots[missed[is_it]]]
            missed = missed[~is_it & (found != self.FREE)]
        return rank


def merges_of(model):
    """[(left, right)] of a tokenizer.json, which may write a merge as one string."""
    return [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
