"""The shuffle of preparation, on disk: encoded documents in, out in random order, bounded memory.

(The order of the windows in training is dataloader.permute.)

    shuffle = DiskShuffle(folder, seed)
    shuffle.add([Document(digest, size, payload, place), …])      # in the order of arrival
    for document in shuffle.shuffled(): …                         # in an order of the seed alone

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
from typing import NamedTuple

import numpy as np

try:
    import resource
except ImportError:                  # Windows, whose limit is 8,192 files
    resource = None

BUCKETS = 256
BUCKET_BYTES = 128 << 20
WRITE_BUFFER = 64 << 10              # of each bucket: 16 MiB for all
_HEADER = struct.Struct("<Q16sHQQ")  # key, digest, bytes of place, size, bytes of payload


class Document(NamedTuple):
    digest: bytes        # of its content, see content_digest()
    size: int            # UTF-8 bytes of its text
    payload: bytes       # what the caller packed
    place: str = ""      # file:line; kept only where duplicates are looked for


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
    """Documents in, shuffled documents out. `folder` must be empty; it is removed at the end.

    With `dedup`, documents of equal digest are returned once, the first that arrived; the others
    go to `on_duplicate(document)`. The key is then made from the digest, so that copies meet in one
    bucket and no set of digests is kept in memory. Without it, the key is made from the document's
    number, and copies of one document end up far apart.
    """

    def __init__(self, folder, seed, dedup=False, on_duplicate=None):
        self._folder = folder
        self._dedup = dedup
        self._on_duplicate = on_duplicate
        self._seed = _splitmix(np.array([seed & (2**64 - 1)], np.uint64))
        self._count = 0
        self._files = {}
        _allow_open_files(BUCKETS + 256)

    def add(self, documents):
        """Append documents. shuffled() gives their payloads back."""
        if self._dedup:
            digests = b"".join(document.digest for document in documents)
            numbers = np.frombuffer(digests, "<u8")[1::2]
        else:
            numbers = np.arange(self._count, self._count + len(documents), dtype=np.uint64)
        self._count += len(documents)
        keys = _splitmix(numbers ^ self._seed).tolist()
        for key, (digest, size, payload, place) in zip(keys, documents):
            name = place.encode("utf-8", "surrogateescape") if self._dedup else b""
            header = _HEADER.pack(key, digest, len(name), size, len(payload))
            self._append(self._files, self._folder, key >> 56, header + name + payload)

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
        """Yield the Documents in the order of their keys. Call once."""
        last = None
        for document in self._in_order(self._files, self._folder, 48):
            if self._dedup and document.digest == last:
                self._on_duplicate(document)
                continue
            last = document.digest
            yield document
        shutil.rmtree(self._folder)

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
            while header := file.read(_HEADER.size):
                key, _, name_size, _, payload_size = _HEADER.unpack(header)
                rest = file.read(name_size + payload_size)
                self._append(smaller, folder, key >> shift & 255, header + rest)
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
    entries, at = [], 0
    while at < len(data):
        key, _, name_size, _, payload_size = _HEADER.unpack_from(data, at)
        entries.append((key, at))                       # equal keys stay in the order of arrival
        at += _HEADER.size + name_size + payload_size
    entries.sort()
    for key, at in entries:
        _, digest, name_size, size, payload_size = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        place = bytes(data[at: at + name_size]).decode("utf-8", "surrogateescape")
        at += name_size
        yield Document(digest, size, data[at: at + payload_size], place)
