"""Which documents are for validation: decided by a hash of their content.

    split = ValidationSplit(0.01, may_cut=True)
    split.count(documents)           # Documents; all of them, in any order
    split.decide()
    split.in_validation(documents)   # an array of bool: which of them are for validation
    split.to_cut(documents)          # those whose end is for validation, mostly none

The hash of a document is a number between 0 and 1; validation takes those below its fraction. So
the split stays as it is when files are added. With few documents, or a huge one, that could be 0%
or 80% of the bytes. Then the documents with the lowest numbers that keep the share within a factor
of two are taken instead, and the end of one more where whole ones do not suffice.
"""
import math
from collections import Counter

import numpy as np

LOWEST_KEPT = 64                     # documents that are candidates where the hash alone won't do


class ValidationSplit:
    """`fraction`: the share of bytes for validation. `may_cut`: whether a document may be cut.

    Documents with the same first 8 bytes of their digest stay together.
    """

    def __init__(self, fraction, may_cut):
        self.fraction = fraction
        self.may_cut = may_cut
        self.total = 0
        self._bound = math.ceil(fraction * 2**64)  # a digest's number below it: for validation
        self._below = Counter()                  # bytes of those documents, by size.bit_length()
        self._lowest = {}                        # the lowest numbers -> bytes
        self._giant = (0, None)                  # bytes and number of the largest document
        self._giant_total = 0                    # bytes of all its copies
        self._largest = None                     # bit length from which on sizes are for training
        self._whole = set()                      # numbers of further documents for validation
        self._cut = {}                           # number -> share, at its end, for validation

    def count(self, documents):
        """Count some Documents; all calls come before decide()."""
        numbers, sizes = documents.digests[:, 0], documents.sizes
        if not len(sizes):
            return
        bound = 2**64 - 1
        if len(self._lowest) >= LOWEST_KEPT:
            bound = max(self._bound, max(self._lowest))
        self.total += int(sizes.sum())
        largest = int(sizes.argmax())
        if sizes[largest] > self._giant[0]:
            self._giant = (int(sizes[largest]), int(numbers[largest]))
            self._giant_total = 0
        self._giant_total += int(sizes[numbers == self._giant[1]].sum())
        for index in np.flatnonzero(numbers <= np.uint64(bound)).tolist():
            self._count_low(int(numbers[index]), int(sizes[index]))

    def _count_low(self, number, size):
        if number < self._bound:
            self._below[size.bit_length()] += size
        self._lowest[number] = self._lowest.get(number, 0) + size
        if len(self._lowest) > LOWEST_KEPT:
            del self._lowest[max(self._lowest)]

    def decide(self):
        """Fix the split, when all documents have been counted."""
        wanted, chosen = self.fraction * self.total, 0
        for bits in sorted(self._below):
            if chosen + self._below[bits] > 2 * wanted:
                self._largest = bits
                break
            chosen += self._below[bits]
        for number, size in sorted(self._lowest.items()):
            if chosen >= wanted / 2:
                return
            if self._is_low(number, size):
                continue
            if chosen + size <= 2 * wanted:
                self._whole.add(number)
                chosen += size
            elif self.may_cut:
                self._cut[number] = (wanted - chosen) / size     # of each copy
                return
        if self.may_cut and chosen < wanted / 2:
            self._cut[self._giant[1]] = (wanted - chosen) / self._giant_total
        elif not chosen and self._lowest:
            self._whole.add(min(self._lowest))   # of a few conversations, one

    def _is_low(self, number, size):
        """Whether the hash alone decides for validation; numbers, or arrays of them."""
        # of a bit length below `_largest`; None: any
        limit = 2**63 if self._largest is None else 2 ** (self._largest - 1)
        return (size < limit) & (number < self._bound)

    def in_validation(self, documents):
        """Whether each of the Documents is for validation as a whole: an array of bool."""
        numbers = documents.digests[:, 0]
        found = self._is_low(numbers, documents.sizes)
        if self._whole:
            found |= np.isin(numbers, np.array(list(self._whole), np.uint64))
        return found

    def to_cut(self, documents):
        """{index of a document: how many bytes from its end are for validation}"""
        if not self._cut:
            return {}
        numbers, sizes = documents.digests[:, 0].tolist(), documents.sizes.tolist()
        return {i: self._cut[number] * sizes[i]
                for i, number in enumerate(numbers) if number in self._cut}
