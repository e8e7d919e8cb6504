"""Encoded documents: one, and many as columns.

    documents = columns([Document(digest, size, payload, place), …])
    documents.digests[:, 0] < bound              # numpy, for all of them at once
    few = documents.chosen(is_chosen)            # those of which is_chosen[i] is true

Many processes encode, one shuffles and writes. That one limits all of them, so it handles columns.
"""
import itertools
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    digest: bytes        # of its content, 16 bytes, see shuffle.content_digest()
    size: int            # UTF-8 bytes of its text
    payload: bytes       # what the caller packed
    place: str           # file:line


class Documents(NamedTuple):
    digests: np.ndarray  # (n, 2) uint64
    sizes: np.ndarray    # (n,) int64
    payloads: list       # of bytes or memoryview
    places: list         # of str; empty where they are not kept

    def chosen(self, is_chosen):
        """The documents at the true entries of `is_chosen`, an array of bool."""
        payloads = list(itertools.compress(self.payloads, is_chosen.tolist()))
        places = list(itertools.compress(self.places, is_chosen.tolist()))
        return Documents(self.digests[is_chosen], self.sizes[is_chosen], payloads, places)


def columns(documents):
    """A list of Document as Documents."""
    digest_bytes = b"".join(document.digest for document in documents)
    digests = np.frombuffer(digest_bytes, "<u8").reshape(-1, 2)
    sizes = np.array([document.size for document in documents], np.int64)
    payloads = [document.payload for document in documents]
    places = [document.place for document in documents]
    return Documents(digests, sizes, payloads, places)
