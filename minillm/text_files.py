"""Files and directories as blocks of raw records: many formats in, nothing read whole.

    source = Source(["raw/", "corpus.tar.bz2"], report, encoding="utf-8", document="file")
    for block in source.blocks(): …              # to text_reader.py, in this process or in another
    for blocks in batches_of(source.blocks(), BLOCK): …      # … those of small files together

Files are .jsonl, .json, .ndjson, .txt or .parquet; all but .parquet also compressed (.gz .bz2 .xz
.zst) or in a tar. JSON comes one record per line, as an array, or as values one after the other. A
directory stands for such files below it, in the order of their paths, without names that begin with
a dot; files of other kinds are counted, links followed, and no file is read twice. A byte order
mark decides the encoding, otherwise `encoding` does.

Memory is one line (at most MAX_LINE bytes), one block, and the decompressor's buffers.
"""
import gzip
import io
import lzma
import os
import tarfile
import zlib
from functools import partial
from typing import NamedTuple

from minillm.encodings import (Transcoded, guess_encoding, is_wide, known_encoding,
                               marked_encoding, refuse_utf8)
from minillm.errors import UserError
from minillm.json_stream import MAX_LINE, form_of, json_values
from minillm.open_files import (Rewound, each_once, find_files, kind_of, look_ahead, open_streams,
                                refuse_pointer, zstd_errors)
from minillm.txt_documents import txt_documents

BLOCK = 1 << 20              # bytes of a block
HEAD = 64 << 10              # bytes of a file that are looked at to tell what it is
LONG_HEAD = 4 << 20          # … where the first record is longer than that
# what reading a damaged or truncated archive raises
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, gzip.BadGzipFile)


class Block(NamedTuple):
    """Some records that follow one another in a file.

    kind "lines": data is bytes, whole lines of JSON, the first of them number `first`;
    "records": data is [(place, JSON value)]; "texts": data is [(place, text of a .txt document)].
    """
    kind: str
    name: str
    first: int
    data: object
    size: int = 0                # of the data: bytes, or characters where it is decoded
    encoding: str = "utf-8"


class Source:
    """Files and directories as one stream of blocks.

    `size` is the number of bytes on disk in all files, `position` how many of them have been read:
    the two ends of a progress bar, compressed or not. `document` says what a document of a .txt is:
    "file", "paragraph" (up to a blank line) or "line". Raises UserError for a path that is not
    there, not of a known kind, or damaged.
    """

    def __init__(self, paths, report, encoding="utf-8", document="file"):
        self.report = report
        self.encoding = known_encoding(encoding)
        self.document = document
        self.named = [os.fspath(path) for path in paths]
        found = [file for path in paths for file in find_files(path, report)]
        self.files = each_once(found, report)
        self.size = 0
        for path in self.files:
            try:
                self.size += os.path.getsize(path)
            except OSError as error:
                reason = error.strerror
                if isinstance(error, FileNotFoundError) and os.path.islink(path):
                    reason = f"it is a link to {os.readlink(path)}, which is not there: remove it"
                raise UserError(f"cannot read {path}: {reason}") from None
        self.position = 0                # set by the thread that reads; others only look at it

    def leave_out_txt(self):
        """Count the .txt files of folders as of another kind, for they hold no conversations.

        UserError for one that was named itself, or if there is nothing else.
        """
        texts = [path for path in self.files if kind_of(path) == "txt"]
        others = [path for path in self.files if kind_of(path) != "txt"]
        for path in texts:
            if path in self.named or not others:
                raise UserError(f"{path}: conversations come as JSON or parquet, not as .txt")
            self.report.other_file(path)
            self.size -= os.path.getsize(path)
        self.files = others

    def blocks(self, size=BLOCK):
        """Yield the Blocks of all files, of about `size` bytes each."""
        finished = 0
        for path in self.files:
            try:
                with open(path, "rb") as raw:
                    refuse_pointer(path, raw)
                    for block, share in self._blocks_of(path, raw, size):
                        if share is not None:
                            self.position = finished + int(share * os.path.getsize(path))
                        elif raw.seekable():             # not a pipe
                            self.position = finished + raw.tell()
                        yield block
                self.position = finished = finished + os.path.getsize(path)
            except (*DAMAGED, *zstd_errors()) as error:
                raise UserError(f"{path} is damaged or cut short ({error}): "
                                "fetch it again") from None
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"cannot read {path}: {reason}") from None

    def _blocks_of(self, path, raw, size):
        """Yield (block, share of the file that has been read, or None) of one file."""
        if kind_of(path) == "parquet":
            yield from _parquet_blocks(path, size)
            return
        for name, kind, stream in open_streams(path, raw, self.report):
            stream, encoding = self._as_text(name, kind, stream)
            blocks = self._json_blocks if kind == "json" else self._txt_blocks
            for block in blocks(name, stream, encoding, size):
                yield block, None

    def _as_text(self, name, kind, stream):
        """(stream, encoding) of a file's text; no byte order mark, lines end in \\n."""
        encoding = self.encoding
        head, stream = look_ahead(stream, HEAD)
        mark, marked = marked_encoding(head)
        if marked:
            self.report.repair("byte order mark removed", f"{name}:1")
            stream.read(mark)
            encoding = marked
        else:
            refuse_utf8(name, head, encoding)
        if is_wide(encoding):
            on_broken = partial(self.report.repair, f"not {encoding}, made U+FFFD", name)
            stream = io.BufferedReader(Transcoded(stream, encoding, on_broken), HEAD)
            encoding = "utf-8"
        head, stream = look_ahead(stream, HEAD)
        self._refuse_nuls(name, kind, head)
        if kind == "txt" and b"\r" in head and b"\n" not in head:
            self.report.repair("CR line ends made LF", f"{name}:1")
            stream = io.BufferedReader(Rewound(b"", stream, b"\r"), HEAD)
        return stream, encoding

    def _refuse_nuls(self, name, kind, head):
        """UserError where a file is UTF-16 or UTF-32 without a mark, or no text at all."""
        nuls = head.count(b"\0")
        if not nuls or (kind == "json" and nuls < len(head) / 8):
            return
        fits = guess_encoding(head[: 1 << 12])
        if fits and is_wide(fits):
            raise UserError(f"{name} holds NUL bytes: it looks like {fits}, "
                            f"so try --encoding={fits}")
        if kind == "txt":
            raise UserError(f"{name} holds NUL bytes: it is not plain text")

    def _json_blocks(self, name, stream, encoding, size):
        head, stream = look_ahead(stream, HEAD)
        form = form_of(head.decode(encoding, "ignore"), len(head) < HEAD)
        if form is None:
            head, stream = look_ahead(stream, LONG_HEAD)
            form = form_of(head.decode(encoding, "ignore"), True)
        if form == "lines":
            yield from self._line_blocks(name, stream, encoding, size)
            return
        records = json_values(stream, encoding, name, form, self.report)
        yield from _filled_blocks("records", name, records, size)

    def _line_blocks(self, name, stream, encoding, size):
        first = 1
        while data := stream.read(size):
            count = data.count(b"\n")
            if not data.endswith(b"\n"):
                last_start = data.rfind(b"\n") + 1
                rest = stream.readline(MAX_LINE + 1)
                count += 1
                if len(data) - last_start + len(rest) > MAX_LINE:
                    place = f"{name}:{first + count - 1}"
                    self.report.skip(f"line longer than {MAX_LINE >> 20} MiB", place)
                    while rest and not rest.endswith(b"\n"):
                        rest = stream.readline(1 << 20)
                    data, rest = data[:last_start], b""
                data += rest
            refuse_utf8(name, data, encoding)
            yield Block("lines", name, first, data, len(data), encoding)
            first += count

    def _txt_blocks(self, name, stream, encoding, size):
        documents = txt_documents(name, stream, encoding, self.document, self.report)
        texts = ((place, text, len(text)) for place, text in documents)
        yield from _filled_blocks("texts", name, texts, size // 2)   # a character: 1 to 4 bytes


def _filled_blocks(kind, name, items, size):
    """Yield Blocks of about `size` characters. items: (place, value, characters)."""
    data, total = [], 0
    for place, value, length in items:
        data.append((place, value))
        total += length
        if total >= size:
            yield Block(kind, name, 1, data, total)
            data, total = [], 0
    if data:
        yield Block(kind, name, 1, data, total)


def batches_of(blocks, size):
    """Yield lists of blocks that follow one another, of `size` / 2 or more together.

    A call of the encoder costs about as much for a small file as for one of 10,000 characters, so
    small files share one. An error in `blocks` comes after what was read before it.
    """
    batch, total, late_error = [], 0, None
    try:
        for block in blocks:
            batch.append(block)
            total += block.size
            if total >= size // 2:
                yield batch
                batch, total = [], 0
    except Exception as error:
        late_error = error
    if batch:
        yield batch
    if late_error:
        raise late_error


def _parquet_blocks(path, size):
    try:
        import pyarrow                                   # optional: 50 MB that few need
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: `pip install pyarrow`") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number, rows = 0, max(1, file.metadata.num_rows)
            row_bytes = max(1, sum(file.metadata.row_group(group).total_byte_size
                                   for group in range(file.num_row_groups)) // rows)
            for batch in file.iter_batches(batch_size=max(1, min(1 << 16, size // row_bytes))):
                records = []
                for record in batch.to_pylist():
                    number += 1
                    records.append((f"{path}, record {number}", record))
                block = Block("records", path, 1, records, row_bytes * len(records))
                yield block, number / rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged or cut short ({reason}): fetch it again") from None
