"""A file read as preparation reads it; compressed files and archives to read.

    read(path)                           # its documents
    read(path, conversations)            # its conversations
"""
import bz2
import codecs
import gzip
import io
import lzma
import sys
import tarfile
from typing import NamedTuple

import pytest

from minillm.report import Report
from minillm.text_files import Source
from minillm.text_reader import documents

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


BOMS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


class Found(NamedTuple):
    items: list                      # documents, or conversations
    skipped: dict = {}               # {reason: count}
    repaired: dict = {}              # {reason: count}
    left_out: dict = {}              # {key: number of records}


def counts(table):
    return {reason: entry["count"] for reason, entry in table.items()}


def read(path, reader=documents, encoding="utf-8", document="file", **options):
    """What `reader` finds in a file or folder, and what the report counts."""
    report = Report()
    source = Source([str(path)], report, encoding, document)
    items = [item for _, item in reader(source, **options)]
    return Found(items, counts(report.skipped), counts(report.repaired), dict(report.left_out))


def places(path):
    """"file:line" of every document, and the Report."""
    report = Report()
    return [place for place, _ in documents(Source([str(path)], report))], report


def compress(suffix, data):
    """`data` as a file with that suffix holds it: "", "gz", "bz2", "xz" or "zst"."""
    if suffix == "gz":
        return gzip.compress(data)
    if suffix == "bz2":
        return bz2.compress(data)
    if suffix == "xz":
        return lzma.compress(data)
    if suffix == "zst":
        return pytest.importorskip(ZSTD).compress(data)
    return data


def tar(members):
    """The bytes of a tar of {path: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in members.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
