"""JSON that is not one record per line: arrays, pretty-printed and concatenated values, one by one.

    form_of(head)                            # "lines", "array" or "values"
    for place, value, size in json_values(stream, "utf-8", "chats.json", "array", report): …

Memory is one value (at most MAX_LINE bytes), never the file.
"""
import codecs
import json
import re

from minillm.chat_names import CONTENT_KEYS, ROLE_KEYS
from minillm.encodings import guess_encoding
from minillm.errors import UserError

MAX_LINE = 64 << 20          # bytes of a line, or of a JSON value
WRAPPERS = ("data", "rows", "records", "examples", "items", "instances", "train")
_WRAPPED = re.compile(r'\{\s*"(?:%s)"\s*:\s*\[' % "|".join(WRAPPERS))
_OPENS = re.compile(r'\[|' + _WRAPPED.pattern)
_KEY = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*')
BETWEEN = re.compile(r"[\s,\ufeff]*")           # two values
_SPACE = " \t\r\n\ufeff"
STRICT = json.JSONDecoder()                      # a line end inside a string is an error
LENIENT = json.JSONDecoder(strict=False)         # a raw tab or NUL inside a string is kept


def is_message(value):
    """Whether a value looks like one turn of a conversation."""
    return (isinstance(value, dict)
            and not value.keys().isdisjoint(ROLE_KEYS)
            and not value.keys().isdisjoint(CONTENT_KEYS))


def are_messages(value):
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def are_texts(value):
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def parsed(value):
    """A list that was written as a string of JSON, as some exporters do, read."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def form_of(head, whole):
    """How a JSON file begins: "lines", "array", "values"; None if more of it must be seen.

    head: the first characters of the file; whole: no more than these will be shown.
    """
    head = head.lstrip(_SPACE)
    opening = _OPENS.match(head)
    if opening and opening[0] != "[":
        value, end = _decoded(head, 0)
        if _is_a_line(head) or (end is not None and len(value) > 1):
            opening = None                           # a record with a list of its own
        elif end is None and not whole:
            return None
    if opening:
        first, end = _decoded(head, BETWEEN.match(head, opening.end()).end())
        if end is None:
            return _array_or_lines(head, opening) if whole else None
        if is_message(first) or not isinstance(first, (dict, list, str)):
            opening = None                           # a conversation, or a list of something else
        else:
            return "array"
    if not head.startswith(("{", "[")):
        return "lines"
    _, end = _decoded(head, 0)
    if end is None:
        return "lines" if whole else None
    return "values" if "\n" in head[:end] else "lines"


def _is_a_line(head):
    """Whether the first object ends with its line, because another one follows without a comma."""
    line, _, rest = head.partition("\n")
    return line.rstrip().endswith("}") and rest.lstrip(_SPACE).startswith("{")


def _array_or_lines(head, opening):
    """ "array" or "lines", for a file whose first element cannot be decoded."""
    first_line = head.partition("\n")[0].strip()
    return "array" if first_line in ("[", opening[0]) else "lines"


def _decoded(text, start):
    try:
        return STRICT.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, None


def json_values(stream, encoding, name, form, report):
    """Yield (place, value, characters) of each value of a stream; of each element of an array."""
    buffer = _Buffer(stream, encoding, name)
    inside, number = form == "values", 0
    while True:
        if not buffer.skip(BETWEEN):
            return
        if form == "array" and not inside:
            opening = buffer.match(_OPENS)
            if opening:
                inside = True
                continue
            key = buffer.match(_KEY)                 # "version" of {"data": […], "version": 1}
            value, size = buffer.decode() if key else (None, None)
            if size is not None:
                if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
                    report.left_out[json.loads(key[1])] += len(value)
                continue
            if buffer.text[buffer.at] != "}":        # other than its end
                place = f"{name}, record {number + 1}"
                report.skip("not understood, with all that follows in this file", place)
                return
            buffer.at += 1
            continue
        if form == "array" and buffer.text[buffer.at] == "]":
            buffer.at += 1
            inside = False
            continue
        number += 1
        place = f"{name}, record {number}"
        value, size = buffer.decode()
        if size is None:
            report.skip("malformed JSON, with all that follows in this file", place)
            return
        yield place, value, size


class _Buffer:
    """The characters of a stream that are not consumed yet: text[at:]."""

    def __init__(self, stream, encoding, name):
        self._stream, self._name, self._encoding = stream, name, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self.text, self.at = "", 0

    def more(self):
        """Read as much again as is there; False at the end of the stream."""
        rest = self.text[self.at:]
        if len(rest) > MAX_LINE:
            raise UserError(f"{self._name} holds a value longer than {MAX_LINE >> 20} MiB, "
                            "or malformed JSON")
        data = self._stream.read(max(1 << 16, len(rest)))
        try:
            self.text, self.at = rest + self._decoder.decode(data, not data), 0
        except UnicodeDecodeError:
            fits = guess_encoding(data[: 1 << 14])
            hint = ""
            if fits == self._encoding:
                hint = f" throughout: `iconv -c -f {fits} -t utf-8 OLD > NEW` drops what is damaged"
            elif fits:
                hint = f": it looks like {fits}, so try --encoding={fits}"
            raise UserError(f"{self._name} is not {self._encoding}{hint}") from None
        return bool(data)

    def skip(self, pattern):
        """Go past `pattern`; False at the end of the stream."""
        while True:
            self.at = pattern.match(self.text, self.at).end()
            if self.at < len(self.text):
                return True
            if not self.more():
                return False

    def match(self, pattern):
        """Go past `pattern` if it is here."""
        if len(self.text) - self.at < 100:
            self.more()
        found = pattern.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def decode(self):
        """(value, characters) of the next JSON value; (None, None) if the stream ends inside it."""
        while True:
            try:
                value, end = LENIENT.raw_decode(self.text, self.at)
            except (ValueError, RecursionError):
                if self.more():
                    continue
                return None, None
            size = end - self.at
            self.at = end
            return value, size
