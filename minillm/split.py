"""Which documents are for validation: decided by a hash of their content.

    split = ValidationSplit(0.01)
    split.count(documents)           # all of them, in any order
    split.decide()
    split.in_validation(document)    # whole; or split.bytes_to_cut(document) from its end

The hash of a document is a number between 0 and 1; validation takes those below its fraction. So
the split stays as it is when files are added. With few documents, or a huge one, that could be 0%
or 80% of the bytes. Then the documents with the lowest numbers that keep the share within a factor
of two are taken instead, and the end of one more where whole ones do not suffice.
"""
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
        self._bound = fraction * 2**64           # a digest's number below it: for validation
        self._below = Counter()                  # bytes of those documents, by size.bit_length()
        self._lowest = {}                        # the lowest numbers -> bytes
        self._giant = (0, None)                  # bytes and number of the largest document
        self._largest = None                     # bit length from which on sizes are for training
        self._whole = set()                      # numbers of further documents for validation
        self._cut = {}                           # number -> bytes from its end for validation

    def count(self, documents):
        """Count some documents; all calls come before decide()."""
        digests = b"".join(document.digest for document in documents)
        numbers = np.frombuffer(digests, "<u8")[::2]
        bound = self._bound
        if len(self._lowest) < LOWEST_KEPT:
            bound = 2.0**64
        else:
            bound = max(bound, max(self._lowest))
        sizes = [document.size for document in documents]
        self.total += sum(sizes)
        if sizes and max(sizes) > self._giant[0]:
            largest = sizes.index(max(sizes))
            self._giant = (max(sizes), int(numbers[largest]))
        for index in np.flatnonzero(numbers <= bound).tolist():
            self._count_low(int(numbers[index]), sizes[index])

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
                self._cut[number] = wanted - chosen
                return
        if self.may_cut and chosen < wanted / 2:
            self._cut[self._giant[1]] = wanted - chosen
        elif not chosen and self.fraction and self._lowest:
            self._whole.add(min(self._lowest))   # of a few conversations, one

    def _is_low(self, number, size):
        small = self._largest is None or size.bit_length() < self._largest
        return small and number < self._bound

    def in_validation(self, document):
        """Whether the whole document is for validation."""
        number = _number(document)
        return number in self._whole or self._is_low(number, document.size)

    def bytes_to_cut(self, document):
        """How many bytes from the end of a document are for validation; None for most."""
        return self._cut.get(_number(document)) if self._cut else None


def _number(document):
    return int.from_bytes(document.digest[:8], "little")
