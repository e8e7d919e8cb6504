"""Files and directories opened as streams of bytes, decompressed.

    for path in find_files("raw/", report):
        with open(path, "rb") as raw:
            for name, kind, stream in open_streams(path, raw, report): …

A directory stands for the files of a known kind below it, in the order of their paths, without
those that begin with a dot; links are followed. Files of other kinds are counted in the report. A
file's suffix says what it holds, its first bytes how it is packed.
"""
import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile

from minillm.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
TAR_SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", *(".tar" + suffix for suffix in COMPRESSED))
KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".txt": "txt", ".parquet": "parquet"}
KNOWN = ".jsonl, .json, .ndjson, .txt (plain, .gz, .bz2, .xz, .zst or in a tar) or .parquet"


class Rewound(io.RawIOBase):
    """A stream that begins with bytes that were read from it before; `line_end` becomes \\n."""

    def __init__(self, head, stream, line_end=None):
        self._head, self._stream, self._line_end = memoryview(head), stream, line_end

    def readable(self):
        return True

    def readinto(self, buffer):
        if len(self._head):
            count = min(len(buffer), len(self._head))
            buffer[:count] = self._head[:count]
            self._head = self._head[count:]
        else:
            count = self._stream.readinto1(buffer)       # no copy, however many are nested
        if self._line_end:
            buffer[:count] = bytes(buffer[:count]).replace(self._line_end, b"\n")
        return count


def look_ahead(stream, size):
    """(the first `size` bytes of a stream, the stream with them)."""
    head = stream.read(size)
    return head, io.BufferedReader(Rewound(head, stream), 1 << 18)


def find_files(path, report):
    """The files that `path` stands for: itself, or those of a known kind below a directory."""
    if os.path.isdir(path):
        found = _files_below(path)
        known = list(filter(kind_of, found))
        if not known:
            raise UserError(f"{path} holds no file of a known kind: {KNOWN}")
        for other in found:
            if not kind_of(other):
                report.other_file(other)
        return known
    if not os.path.exists(path):
        raise UserError(f"no such file or directory: {path}")
    if not kind_of(path):
        raise UserError(f"{path} is of no known kind: {KNOWN}")
    return [path]


def _files_below(path):
    """The files below a directory, sorted; each directory once, though a link leads to it too."""
    def refuse(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    found, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def each_once(paths, report):
    """The paths, each file once: without links to others of them, and without what is named twice.

    No text is read twice. What goes is counted in the report.
    """
    first = {}
    links_last = sorted(enumerate(paths), key=lambda item: os.path.islink(item[1]))
    for number, path in links_last:
        first.setdefault(os.path.realpath(path), number)
    kept = set(first.values())
    for number, path in enumerate(paths):
        if number not in kept:
            report.other_file(path, "link" if os.path.islink(path) else "named twice")
    return [path for number, path in enumerate(paths) if number in kept]


def kind_of(name):
    """ "tar", "json", "txt", "parquet" or None, by the suffix."""
    name = name.lower()
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    stem, suffix = os.path.splitext(name)
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
        return None if suffix == ".parquet" else KINDS.get(suffix)
    return KINDS.get(suffix)


def refuse_pointer(path, raw):
    """Raise UserError for what `git clone` leaves of a large file where Git LFS is missing."""
    if raw.peek(64).startswith(b"version https://git-lfs.github.com/"):
        raise UserError(f"{path} is a pointer of Git LFS, not the file: `git lfs pull` fetches it")


def open_streams(path, raw, report):
    """Yield (name, kind, binary stream) of the file, or of each text file inside a tar."""
    stream = _decompressed(raw, path)
    if kind_of(path) != "tar":
        yield path, kind_of(path), stream
        return
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name, inside = os.path.basename(member.name), f"{path}/{member.name}"
            if member.isdir() or name.startswith("."):
                continue
            if member.issym() or member.islnk():
                report.other_file(inside, "link")
            elif member.isfile() and kind_of(name) in ("json", "txt"):
                yield inside, kind_of(name), _decompressed(archive.extractfile(member), inside)
            else:
                report.other_file(inside)


def _decompressed(stream, name):
    """The decompressed stream; its first bytes, not its name, say how it is compressed."""
    head, stream = look_ahead(stream, 1 << 10)
    if head.startswith(b"\x1f\x8b"):
        opened = gzip.open(stream)
    elif head.startswith(b"BZh"):
        opened = bz2.open(stream)
    elif head.startswith(b"\xfd7zXZ\0"):
        opened = lzma.open(stream)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        opened = _zstd(name).open(stream)
    else:
        return stream
    return io.BufferedReader(opened, 1 << 18)


def _zstd(name):
    try:
        from compression import zstd             # optional: part of Python from 3.14 on
    except ImportError:
        try:
            from backports import zstd           # optional: a package for older ones
        except ImportError:
            raise UserError(f"{name} is compressed with zstd: `pip install backports.zstd`, "
                            "or `unzstd` it first") from None
    return zstd


def zstd_errors():
    """What reading a damaged .zst raises: the class, where the package was needed."""
    modules = [sys.modules.get(name) for name in ("compression.zstd", "backports.zstd")]
    return [module.ZstdError for module in modules if module]
