"""Shuffling encoded documents on their way to the token files, in one pass over the text and bounded memory.

    spool = Spool(folder, seed)
    spool.add(digest, payload)          # in the order of arrival
    for record in spool.shuffled(): …   # in an order that depends on the seed alone

Each document gets a pseudo-random 64-bit key and is appended to one of 256 bucket files by the key's
top bits; then one bucket after the other is read, sorted by key, and handed out. That is a uniform
shuffle of the whole corpus with one bucket (BUCKET_BYTES at most, else it is split again) in memory.
The price is disk: beside the token files, as much again (two bytes a token, three for SFT, and about
40 a document) until the end of the run. The raw text is never read twice.
"""
import collections
import concurrent.futures
import hashlib
import os
import resource
import shutil
import struct
import typing

from minillm.text_reader import in_background

BUCKETS = 256
BUCKET_BYTES = 128 << 20
WRITE_BUFFER = 64 << 10              # of each bucket: 16 MiB for all
_HEADER = struct.Struct("<Q16sHI")   # key, digest, bytes of place, bytes of payload


class Record(typing.NamedTuple):
    key: int             # where it stands in the shuffled order
    digest: bytes        # of the document's content, see digest()
    place: str           # file:line; "" unless duplicates are looked for
    payload: memoryview  # what the caller packed


def digest(content):
    """128 bits of BLAKE2b of the content (bytes): two documents of the same digest are the same."""
    return hashlib.blake2b(content, digest_size=16).digest()


def place_in_split(digest):
    """Where between 0 and 1 a document falls: validation takes those below its fraction.

    A property of the content alone, so that the split stays as it is when files are added.
    """
    return int.from_bytes(digest[:8], "little") / 2**64


def _mix(x):
    """splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers, so distinct ones never collide."""
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


class Spool:
    """Documents in, shuffled documents out. `folder` must be empty; its bucket files go as they are read.

    With `dedup`, documents of equal digest are handed out once, the first that arrived; the others go
    to `duplicate(record)`. The key is then made from the digest, so that equals meet in one bucket and
    nothing is kept in memory for it. Without, it is made from the document's number, and copies of one
    document lie far apart.
    """

    def __init__(self, folder, seed, dedup=False, duplicate=None):
        self._folder, self._seed, self._dedup, self._duplicate = folder, _mix(seed & (2**64 - 1)), dedup, duplicate
        self._count, self._files = 0, {}
        self._lowest = 1.0
        _allow_open_files(BUCKETS + 256)

    def add(self, digest, payload, place=""):
        """Append a document. `payload`: bytes, as shuffled() shall give them back."""
        number = int.from_bytes(digest[8:], "little") if self._dedup else self._count
        self._count += 1
        self._lowest = min(self._lowest, place_in_split(digest))
        key = _mix(number ^ self._seed)
        place = place.encode("utf-8", "surrogateescape") if self._dedup else b""
        self._append(self._files, self._folder, key >> 56,
                     _HEADER.pack(key, digest, len(place), len(payload)) + place + payload)

    def _append(self, files, folder, bucket, record):
        if bucket not in files:
            files[bucket] = open(os.path.join(folder, f"{bucket:02x}"), "wb", WRITE_BUFFER)
        files[bucket].write(record)

    def in_validation(self, record, fraction):
        """Of a few documents at least one, that which falls lowest; with fraction 0 none."""
        place = place_in_split(record.digest)
        return place < fraction or place == self._lowest and fraction > 0

    def shuffled(self):
        """Yield the Records in the order of their keys. Call once."""
        last = None
        for record in self._in_order(self._files, self._folder, 48):
            if self._dedup and record.digest == last:
                self._duplicate(record)
                continue
            last = record.digest
            yield record
        shutil.rmtree(self._folder)

    def _in_order(self, files, folder, shift):
        """Yield the records of some buckets; `shift` is that of the next eight bits of the key."""
        for file in files.values():
            file.close()
        for bucket in sorted(files):
            path = os.path.join(folder, f"{bucket:02x}")
            if os.path.getsize(path) > BUCKET_BYTES and shift >= 0:
                smaller, subfolder = {}, path + ".split"
                os.mkdir(subfolder)
                with open(path, "rb") as file:
                    while header := file.read(_HEADER.size):
                        key, _, place_size, size = _HEADER.unpack(header)
                        self._append(smaller, subfolder, key >> shift & 255, header + file.read(place_size + size))
                os.remove(path)
                yield from self._in_order(smaller, subfolder, shift - 8)
                os.rmdir(subfolder)
            else:
                with open(path, "rb") as file:
                    data = memoryview(file.read())
                os.remove(path)
                yield from _sorted_records(data)


def _allow_open_files(count):
    """Raise the process's own limit to `count` where that is allowed; on macOS it is 256 at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _sorted_records(data):
    entries, at = [], 0
    while at < len(data):
        key, _, place_size, size = _HEADER.unpack_from(data, at)
        entries.append((key, at))                       # equal keys stay in the order of arrival
        at += _HEADER.size + place_size + size
    entries.sort()
    for key, at in entries:
        _, digest, place_size, size = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        place = bytes(data[at: at + place_size]).decode("utf-8", "surrogateescape")
        yield Record(key, digest, place, data[at + place_size: at + place_size + size])


def encode_ahead(encode, batches, workers=2):
    """Yield encode(batch) for every batch, in order, reading and encoding ahead.

    `batches` is iterated on a thread of its own. Two calls of `encode` are under way at a time, so that
    the library's threads have work while Python packs the ids of the batch before.
    """
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = collections.deque()
        try:
            for batch in in_background(batches, depth=2):
                futures.append(pool.submit(encode, batch))
                if len(futures) > workers:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()


def in_batches(items, size, limit):
    """Lists of consecutive items, each closed when the sum of size(item) reaches `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
