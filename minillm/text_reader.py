"""Reading text and conversations: many formats in, one clean record at a time out, nothing read whole.

    report = Report()
    source = Source(["raw/", "corpus.tar.bz2"], report)
    for place, text in documents(source): ...           # place: "file:line"
    for place, messages in conversations(source): ...   # [{"role": "user", "content": "…"}, …]

Files are `.jsonl` or `.json` (one JSON object a line) or `.txt`, plain or `.gz` `.bz2` `.xz`, or a tar of
those; a directory stands for such files below it, in the order of their paths. What cannot be used is
skipped, what can be put right is repaired; both are counted in the Report by reason, with the first
file:line of each. Nothing is guessed: text is UTF-8 unless the caller names another encoding.

Memory is one line (at most MAX_LINE bytes) and the decompressor's buffers.
"""
import bz2
import gzip
import io
import json
import lzma
import os
import queue
import re
import tarfile
import threading
import zlib

from minillm.errors import UserError

MAX_LINE = 64 << 20          # bytes; a longer line is skipped, it would not fit into the memory promised
TXT_DOCUMENT = 32 << 10      # bytes; a .txt file is cut into documents at the first line end after so many
DECOMPRESS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
TEXT_SUFFIXES = (".jsonl", ".json", ".txt")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = {"human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class Report:
    """What was skipped and what was repaired: {reason: {"count", "first"}}. With `strict`, the first skip raises."""

    def __init__(self, strict=False):
        self.strict, self.skipped, self.repaired = strict, {}, {}

    def skip(self, reason, place):
        if self.strict:
            raise UserError(f"{place}: {reason}; without --strict such lines are skipped and counted")
        _count(self.skipped, reason, place)

    def repair(self, reason, place):
        _count(self.repaired, reason, place)

    def lines(self):
        """The report as lines of text for the terminal; none where all was well."""
        return [f"  {verb} {entry['count']:,}: {reason} (first: {entry['first']})"
                for verb, table in (("repaired", self.repaired), ("skipped", self.skipped))
                for reason, entry in sorted(table.items(), key=lambda item: -item[1]["count"])]


def _count(table, reason, place):
    table.setdefault(reason, {"count": 0, "first": place})["count"] += 1


class Source:
    """Files and directories as one stream of lines.

    `size` is the number of bytes on disk in all files, `position` how many of them have been read: the
    two ends of a progress bar, compressed or not. Raises UserError for a path that is not there, not
    of a known kind, or damaged half-way.
    """

    def __init__(self, paths, report, encoding="utf-8"):
        self.report, self.encoding = report, encoding
        try:
            byte_for_byte = "\n".encode(encoding) == b"\n"
        except (LookupError, ValueError):
            raise UserError(f"unknown encoding {encoding!r}; utf-8 and gb18030 are usual") from None
        if not byte_for_byte:
            raise UserError(f"text in {encoding!r} cannot be cut into lines unread: make it utf-8 first, as `iconv -f {encoding} -t utf-8` does")
        self.files = [file for path in paths for file in _find_files(path)]
        self.size = sum(map(os.path.getsize, self.files))
        self.position = 0                        # set by the thread that reads: another one can't ask a file that may be closed meanwhile

    def lines(self):
        """Yield (kind, place, line): kind "json" or "txt", place "file:line", line of bytes with its line end."""
        finished = 0
        for path in self.files:
            try:
                with open(path, "rb") as raw:
                    for name, kind, stream in _open_streams(path, raw):
                        for number, line in self._lines_of(name, stream):
                            self.position = finished + raw.tell()
                            yield kind, f"{name}:{number}", line
                self.position = finished = finished + os.path.getsize(path)
            except (EOFError, lzma.LZMAError, zlib.error, tarfile.TarError) as error:
                raise UserError(f"{path} is damaged or cut short ({error}): fetch it again") from None
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def _lines_of(self, name, stream):
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(1 << 20)
                self.report.skip(f"line longer than {MAX_LINE >> 20} MiB", f"{name}:{number}")
                continue
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                self.report.repair("byte order mark removed", f"{name}:{number}")
                line = line[3:]
            yield number, line


def _find_files(path):
    """The files that `path` stands for: itself, or those of a known kind below a directory, sorted."""
    if os.path.isdir(path):
        found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path)
                       for name in names if _kind(name) and not name.startswith("."))
        if not found:
            raise UserError(f"{path} holds no .jsonl, .json or .txt file, plain, .gz, .bz2, .xz or in a tar")
        return found
    if not os.path.exists(path):
        raise UserError(f"no such file or directory: {path}")
    if not _kind(path):
        raise UserError(f"{path} is of no known kind: .jsonl, .json or .txt, plain, .gz, .bz2, .xz or in a tar")
    return [path]


def _kind(name):
    """ "tar", "json", "txt" or None, by the suffix."""
    name = name.lower()
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    stem, suffix = os.path.splitext(name)
    suffix = os.path.splitext(stem)[1] if suffix in DECOMPRESS else suffix
    return {".jsonl": "json", ".json": "json", ".txt": "txt"}.get(suffix)


def _open_streams(path, raw):
    """Yield (name, kind, binary stream) of the file, or of each text file inside a tar, in its order."""
    if _kind(path) == "tar":
        with tarfile.open(fileobj=raw, mode="r|*") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if member.isfile() and _kind(name) in ("json", "txt") and not name.startswith("."):
                    yield f"{path}/{member.name}", _kind(name), _decompress(name, archive.extractfile(member))
    else:
        yield path, _kind(path), _decompress(path, raw)


def _decompress(name, stream):
    opener = DECOMPRESS.get(os.path.splitext(name.lower())[1])
    return io.BufferedReader(opener(stream) if opener else stream, 1 << 18)


_parse = json.JSONDecoder(strict=False).decode        # strict=False: a raw tab or NUL inside a string is kept


def _decode(source, place, line):
    try:
        return line.decode(source.encoding)
    except UnicodeDecodeError:
        source.report.skip(f"not {source.encoding}", place)
        return None


def _json_object(source, place, line):
    text = _decode(source, place, line)
    if text is None:
        return None
    text = text.strip(" \t\r\n\ufeff")
    if not text:
        source.report.skip("blank line", place)
        return None
    try:
        record, parsed = _parse(text), True
    except (ValueError, RecursionError):
        record, parsed = None, False
    if text[0] == "[" and place.endswith(":1"):
        raise UserError(f"{place[:-2]} is one JSON array; make it one object a line, as `jq -c '.[]'` does")
    if not parsed:
        source.report.skip("malformed JSON", place)
        return None
    if type(record) is not dict:
        source.report.skip("not a JSON object", place)
        return None
    return record


def _mend(text, report, place):
    """Replace lone surrogates, which no UTF-8 can hold (JSON's \\ud800 makes them), by U+FFFD."""
    if text.isascii() or not LONE_SURROGATE.search(text):
        return text
    report.repair("lone surrogate replaced by U+FFFD", place)
    return LONE_SURROGATE.sub("\ufffd", text)


def documents(source, text_key="text", wanted=lambda line: True, chats=False):
    """Yield (place, text) of each document; text is never blank. `wanted(line)` may refuse a raw line unparsed.

    In JSON lines the text stands under `text_key` and is kept to the letter. A .txt file is cut into
    documents at lines of <|endoftext|>, and at the first line end after TXT_DOCUMENT bytes, so that a
    book neither fills the memory nor falls whole into one split; CRLF line ends become LF there.
    With `chats`, a JSON line without text may hold a conversation; its turns are then the text.
    """
    report, pending, size, where = source.report, [], 0, None
    for kind, place, line in source.lines():
        if pending and (kind != "txt" or place.endswith(":1") or size >= TXT_DOCUMENT):
            yield from _txt_document(pending, where)
            pending, size = [], 0
        if not wanted(line):
            continue
        if kind == "txt":
            if line.rstrip() == b"<|endoftext|>":
                size = TXT_DOCUMENT              # ends the document before; is not part of any
            elif (text := _decode(source, place, line)) is not None:
                if text.endswith("\r\n"):
                    report.repair("CRLF line end made LF", place)
                    text = text[:-2] + "\n"
                where = where if pending else place
                pending.append(text)
                size += len(line)
        elif (record := _json_object(source, place, line)) is not None:
            text = record.get(text_key)
            if text is None and chats:
                messages = clean_conversation(record, report, place)
                if messages:
                    yield place, "\n".join(message["content"] for message in messages)
            elif type(text) is not str:
                report.skip(f"no text under {text_key!r}", place)
            elif not text.strip():
                report.skip("empty text", place)
            else:
                yield place, _mend(text, report, place)
    if pending:
        yield from _txt_document(pending, where)


def _txt_document(lines, place):
    text = "".join(lines)
    if text.strip():
        yield place, text


def conversations(source):
    """Yield (place, messages) of each conversation; messages are [{"role", "content"}, …]: perhaps system, then user and assistant in turn.

    Understood: `conversations` or `messages` (`from`/`value` or `role`/`content`), or `instruction`,
    `input`, `output`. See `clean_conversation` for what is repaired and what is skipped.
    """
    for path in source.files:
        if _kind(path) == "txt":
            raise UserError(f"{path}: conversations come as JSON lines, not as .txt")
    for _, place, line in source.lines():
        record = _json_object(source, place, line)
        if record is not None and (messages := clean_conversation(record, source.report, place)):
            yield place, messages


def clean_conversation(record, report, place):
    """The messages of one JSON record, or None where nothing can be learned from it.

    Skipped: no turns; a turn that is not an object; an unknown role; a system message after the start;
    no assistant turn left. Repaired: cut before an empty (or null) turn; two turns of one role running
    are joined by a line end; assistant turns before the first user turn, and user turns after the last
    assistant turn, are dropped.
    """
    turns = record.get("conversations", record.get("messages"))
    if turns is None and "output" in record:
        question = [part for part in (record.get("instruction"), record.get("input")) if part]
        if not all(type(part) is str for part in question):
            return report.skip("a turn is not text", place)
        turns = [{"role": "user", "content": "\n".join(question)}, {"role": "assistant", "content": record["output"]}]
    if type(turns) is not list or not turns:
        return report.skip("no conversation", place)
    messages = []
    for turn in turns:
        if type(turn) is not dict:
            return report.skip("a turn is not an object", place)
        name, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = ROLES.get(name) if type(name) is str else None
        if role is None:
            return report.skip("unknown role", place)
        if content is None or content == "" or (type(content) is str and not content.strip()):
            report.repair("cut before an empty turn", place)
            break
        if type(content) is not str:
            return report.skip("a turn is not text", place)
        content = _mend(content, report, place)
        if role == "system" and messages:
            return report.skip("system message after the start", place)
        if role == "assistant" and not (messages and messages[-1]["role"] != "system"):
            report.repair("assistant turn before any user turn dropped", place)
        elif messages and messages[-1]["role"] == role:
            report.repair(f"two {role} turns running joined", place)
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    if messages and messages[-1]["role"] == "user":
        if len(messages) > 2:
            report.repair("user turn without an answer dropped", place)
        messages.pop()
    if not messages or messages[-1]["role"] != "assistant":
        return report.skip("no assistant turn", place)
    return messages


def in_background(iterable, depth=4):
    """Iterate `iterable` on a thread of its own, at most `depth` items ahead. Its exceptions come out here."""
    items, stop = queue.Queue(depth), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                pass

    def produce():
        try:
            for item in iterable:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
