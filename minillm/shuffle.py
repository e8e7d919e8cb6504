"""The shuffle of preparation, on disk: encoded documents in, out in random order, bounded memory.

(The order of the windows in training is dataloader.permute.)

    shuffle = DiskShuffle(folder, seed)
    shuffle.add(documents)                       # Documents, in the order of arrival
    for documents in shuffle.shuffled(): …       # … in an order of the seed alone

Each document gets a pseudo-random 64-bit key and is appended to one of 256 bucket files by the
key's top bits. Then one bucket after the other is read, sorted by key, and returned. That is a
uniform shuffle of the whole corpus with one bucket in memory (a bucket above BUCKET_BYTES is split
again). The price is disk: as much again as the token files until the end of the run (two bytes per
token, three for SFT, and about 50 per document). The raw text is never read twice.
"""
import hashlib
import os
import shutil
import struct

import numpy as np

from minillm.documents import Documents

try:
    import resource
except ImportError:                  # Windows, whose limit is 8,192 files
    resource = None

BUCKETS = 256
BUCKET_BYTES = 128 << 20
WRITE_BUFFER = 64 << 10              # of each bucket: 16 MiB for all
HEADER = np.dtype([                  # of a document in a bucket; its place and payload follow
    ("key", "<u8"), ("digest", "<u8", 2), ("size", "<i8"),
    ("place_length", "<u8"), ("payload_length", "<u8")])             # in bytes
_KEY_AND_LENGTHS = struct.Struct("<Q24xQQ")      # of a header
PART = 10_000                        # documents handed on at once


def content_digest(content):
    """128 bits of BLAKE2b of the content (bytes): two documents of the same digest are the same."""
    return hashlib.blake2b(content, digest_size=16).digest()


def scramble(x):
    """The end of splitmix64 (Steele, Lea, Flood 2014), a bijection of uint64, on a numpy array.

    dataloader.permute uses it too.
    """
    with np.errstate(over="ignore"):
        x = x * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _splitmix(x):
    """splitmix64 of a numpy array of uint64: distinct numbers never get the same key."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
    return scramble(x ^ (x >> np.uint64(30)))


class DiskShuffle:
    """Documents in, shuffled documents out. Makes `folder`, and removes it at the end.

    With `dedup`, documents of equal digest are returned once, the first that arrived; the places of
    the others go to `on_duplicate(place)`. The key is then made from the digest, so that copies
    meet in one bucket and no set of digests is kept in memory. Without it, the key is made from the
    document's number, copies of one document end up far apart, and places are not kept.
    """

    def __init__(self, folder, seed, dedup=False, on_duplicate=None):
        self._folder = folder
        self._dedup = dedup
        self._on_duplicate = on_duplicate
        self._seed = _splitmix(np.array([seed & (2**64 - 1)], np.uint64))
        self._count = 0
        self._files = {}
        os.mkdir(folder)
        _allow_open_files(BUCKETS + 256)

    def add(self, documents):
        """Append Documents. shuffled() gives them back."""
        count = len(documents.payloads)
        if self._dedup:
            numbers = documents.digests[:, 1]
            places = [place.encode("utf-8", "surrogateescape") for place in documents.places]
        else:
            numbers = np.arange(self._count, self._count + count, dtype=np.uint64)
            places = [b""] * count
        self._count += count
        headers = np.empty(count, HEADER)
        headers["key"] = _splitmix(numbers ^ self._seed)
        headers["digest"] = documents.digests
        headers["size"] = documents.sizes
        headers["place_length"] = [len(place) for place in places]
        headers["payload_length"] = [len(payload) for payload in documents.payloads]
        buckets = (headers["key"] >> np.uint64(56)).tolist()
        packed = headers.view(f"V{HEADER.itemsize}").tolist()        # a list of bytes
        for bucket, header, place, payload in zip(buckets, packed, places, documents.payloads):
            self._append(self._files, self._folder, bucket, header + place + payload)

    def _append(self, files, folder, bucket, record):
        if bucket not in files:
            try:
                files[bucket] = open(os.path.join(folder, f"{bucket:02x}"), "wb", WRITE_BUFFER)
            except OSError:                      # free file numbers: removing the folder needs one
                for file in files.values():
                    file.close()
                raise
        files[bucket].write(record)

    def shuffled(self):
        """Yield Documents, some thousands at a time, in the order of their keys. Call once."""
        last = None
        for documents in self._in_order(self._files, self._folder, 48):
            digests = documents.digests
            if self._dedup:
                documents = self._without_copies(documents, last)
            last = digests[-1]
            yield documents
        shutil.rmtree(self._folder)

    def _without_copies(self, documents, last):
        """The first of each run of documents with equal digests; `last` is the digest before."""
        digests = documents.digests
        is_copy = np.empty(len(digests), bool)
        is_copy[0] = last is not None and (digests[0] == last).all()
        is_copy[1:] = (digests[1:] == digests[:-1]).all(1)
        for index in np.flatnonzero(is_copy):
            self._on_duplicate(documents.places[index])
        return documents.chosen(~is_copy)

    def _in_order(self, files, folder, shift):
        """Yield the documents of some buckets. `shift`: where the next 8 bits of the key stand."""
        for file in files.values():
            file.close()
        for bucket in sorted(files):
            path = os.path.join(folder, f"{bucket:02x}")
            if os.path.getsize(path) > BUCKET_BYTES and shift >= 0:
                yield from self._in_order(*self._split(path, shift), shift - 8)
                os.rmdir(path + ".split")
            else:
                with open(path, "rb") as file:
                    data = memoryview(file.read())
                os.remove(path)
                yield from _sorted_documents(data)

    def _split(self, path, shift):
        """Cut a bucket into smaller ones; returns them and their folder."""
        smaller, folder = {}, path + ".split"
        os.mkdir(folder)
        with open(path, "rb") as file:
            while header := file.read(HEADER.itemsize):
                [fields] = np.frombuffer(header, HEADER)
                rest = file.read(int(fields["place_length"]) + int(fields["payload_length"]))
                bucket = int(fields["key"]) >> shift & 255
                self._append(smaller, folder, bucket, header + rest)
        os.remove(path)
        return smaller, folder


def _allow_open_files(count):
    """Raise the process's own limit to `count` where that is allowed; on macOS it starts at 256."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _sorted_documents(data):
    """Yield the documents of a bucket as Documents, in the order of their keys."""
    keys, starts, at = [], [], 0
    while at < len(data):
        key, place_length, payload_length = _KEY_AND_LENGTHS.unpack_from(data, at)
        keys.append(key)
        starts.append(at)
        at += HEADER.itemsize + place_length + payload_length
    order = np.argsort(np.array(keys, np.uint64), kind="stable")     # equal ones: as they arrived
    sorted_starts = np.array(starts)[order]
    for first in range(0, len(sorted_starts), PART):
        yield _documents_at(sorted_starts[first: first + PART], data)


def _documents_at(starts, data):
    """The Documents whose headers begin at `starts`; the payloads are views of `data`."""
    header_bytes = starts[:, None] + np.arange(HEADER.itemsize)      # where they stand
    headers = np.frombuffer(data, np.uint8)[header_bytes].view(HEADER)[:, 0]
    place_starts = starts + HEADER.itemsize
    payload_starts = place_starts + headers["place_length"].astype(np.int64)
    payload_ends = payload_starts + headers["payload_length"].astype(np.int64)
    bounds = list(zip(place_starts.tolist(), payload_starts.tolist(), payload_ends.tolist()))
    places = []
    if headers["place_length"].any():
        places = [str(data[place:payload], "utf-8", "surrogateescape")
                  for place, payload, _ in bounds]
    payloads = [data[start:end] for _, start, end in bounds]
    return Documents(headers["digest"], headers["size"], payloads, places)
