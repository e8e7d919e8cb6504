"""Documents out of plain text: a file, a paragraph or a line each.

    for place, text in txt_documents(name, stream, "utf-8", "file", report): …
"""
import codecs

from minillm.json_stream import MAX_LINE

TXT_DOCUMENT = 32 << 10      # bytes; a .txt is cut at the first line end after this many
SENTENCE_ENDS = ("。", "！", "？", ". ", "! ", "? ")
END_LINE = b"<|endoftext|>"


def txt_documents(name, stream, encoding, document, report):
    """Yield (place, text) of the documents of a .txt. `document`: "file", "paragraph" or "line".

    A paragraph ends at a blank line. Each is also cut at lines of <|endoftext|>, and at the first
    line end after TXT_DOCUMENT bytes: a book shall neither fill the memory nor be in one split.
    """
    pending, size, start = [], 0, None
    for number, line, text in _lines(name, stream, encoding, report):
        ends = line.rstrip() == END_LINE
        if document == "paragraph" and not text.strip():
            ends = True
        if not ends:
            start = start or f"{name}:{number}"
            pending.append(text)
            size += len(line)
        if ends or size >= TXT_DOCUMENT or document == "line":
            yield from _joined(pending, start, document)
            pending, size, start = [], 0, None
    yield from _joined(pending, start, document)


def _joined(lines, place, document):
    text = "".join(lines)
    if document != "file":
        text = text.removesuffix("\n")
    if text.strip():
        yield place, text


def _lines(name, stream, encoding, report):
    """Yield (number, line in bytes, line as text); what cannot be used is skipped and counted."""
    for number, line in _limited_lines(name, stream, encoding, report):
        place = f"{name}:{number}"
        if b"\0" in line:
            report.skip("NUL bytes in a line of text", place)
            continue
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError:
            report.undecodable_line(line, encoding, place)
            continue
        if text.startswith("\ufeff"):
            report.repair("byte order mark removed", place)
            text = text[1:]
        if text.endswith("\r\n"):
            report.repair("CRLF line end made LF", place)
            text = text[:-2] + "\n"
        yield number, line, text


def _limited_lines(name, stream, encoding, report):
    """Yield (number, line); a line over MAX_LINE bytes comes in pieces, cut at sentence ends."""
    number, kept = 1, b""
    while line := kept + stream.readline(MAX_LINE - len(kept)):
        kept = b""
        whole = line.endswith(b"\n")
        if len(line) >= MAX_LINE and not whole:
            cut = _last_sentence_end(line, encoding)
            line, kept = line[:cut], line[cut:]
            reason = f"line longer than {MAX_LINE >> 20} MiB cut at a sentence end"
            report.repair(reason, f"{name}:{number}")
        yield number, line
        number += whole


def _last_sentence_end(line, encoding):
    """Where to cut a line: after its last sentence, or else after its last whole character."""
    window = line[-(1 << 20):]
    best = max(_after_last(window, end.encode(encoding, "ignore")) for end in SENTENCE_ENDS)
    if best:
        return len(line) - len(window) + best
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        decoder.decode(line)
    except UnicodeDecodeError:                           # it will be skipped
        return len(line)
    begun, _ = decoder.getstate()                        # the bytes of half a character
    return len(line) - len(begun)


def _after_last(data, word):
    found = data.rfind(word) if word else -1
    return 0 if found < 0 else found + len(word)
