"""Which bytes are which characters: byte order marks, and transcoding of whole streams.

Nothing is guessed silently: a byte order mark decides, otherwise --encoding does. UTF-8 in another
encoding is refused, and where nothing fits, guess_encoding() proposes one for the error message.
"""
import codecs
import io
import unicodedata

from minillm.errors import UserError

# the longest first: the mark of UTF-32-LE begins with that of UTF-16-LE
MARKS = [
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]
WIDE = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}      # without a mark: what Windows writes


def known_encoding(name):
    """The codec's own name. UserError if there is none, or if its text cannot be cut into lines."""
    try:
        encoding = codecs.lookup(name).name
        line_end = "\n".encode(encoding)
        codecs.getincrementaldecoder(encoding)("ignore").decode(b"\n")      # idna can't
    except (LookupError, ValueError):
        raise UserError(f"unknown encoding {name!r}; utf-8 and gb18030 are usual") from None
    encoding = WIDE.get(encoding, encoding).replace("utf-8-sig", "utf-8")
    if line_end == b"\n" or encoding.startswith(("utf-8", "utf-16", "utf-32")):
        return encoding
    fix = f"`iconv -f {name} -t utf-8`"
    raise UserError(f"text in {name!r} cannot be cut into lines: "
                    f"make it utf-8 first, as {fix} does")


def marked_encoding(head):
    """(bytes of the byte order mark, encoding) of a file that begins with `head`, or (0, None)."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return len(mark), encoding
    return 0, None


def is_wide(encoding):
    """Whether its line end is not the one byte \\n."""
    return encoding.startswith(("utf-16", "utf-32"))


def is_utf8(data):
    """Whether bytes that may end inside a character are UTF-8, and not by chance.

    Of the pairs of bytes that are a Chinese character in GBK, about one in six is also a character
    in UTF-8. A dozen different pairs are all so in one text of a billion.
    """
    if data.isascii() or b"\0" in data:
        return False
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return len({char for char in text if char > "\x7f"}) >= 12


def refuse_utf8(name, data, encoding):
    """UserError if a file that is to be in another encoding is UTF-8."""
    if encoding == "utf-8":
        return
    # in UTF-16 and UTF-32, English and line ends hold NUL bytes
    is_english = is_wide(encoding) and data.isascii() and b"\0" not in data and len(data) > 64
    if is_english or is_utf8(data):
        raise UserError(f"{name} is UTF-8, not {encoding}: leave --encoding out, "
                        "and convert files that are not UTF-8")


class Transcoded(io.RawIOBase):
    """A stream of bytes in `encoding`, read as UTF-8. What does not decode becomes U+FFFD.

    on_broken(): called once, before the first U+FFFD.
    """

    def __init__(self, stream, encoding, on_broken):
        self._stream, self._encoding, self._on_broken = stream, encoding, on_broken
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._ready = b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ready:
            data = self._stream.read(1 << 16)
            self._ready = self._decode(data).encode("utf-8", "replace")
            if not data:
                break
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decode(self, data):
        state = self._decoder.getstate()
        try:
            return self._decoder.decode(data, not data)
        except UnicodeDecodeError:
            self._on_broken()
            self._decoder = codecs.getincrementaldecoder(self._encoding)("replace")
            self._decoder.setstate(state)
            return self._decoder.decode(data, not data)


def guess_encoding(sample):
    """The encoding that fits some bytes best, or None where none does. Some may be damaged."""
    if is_utf8(sample):
        return "utf-8"
    best, best_score = None, 0.6
    for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be",
                     "gb18030", "big5", "shift_jis", "euc_kr", "cp1252"):
        if is_wide(encoding) and b"\0" not in sample:
            continue
        text = codecs.getincrementaldecoder(encoding)("replace").decode(sample)
        score = _plausible(text, encoding)
        if score > best_score + 0.02:                # in doubt, the one that stands first
            best, best_score = encoding, score
    return best


def _plausible(text, encoding):
    """The share of characters that usual text has; ASCII counts only where all is ASCII."""
    other = [char for char in text if not " " <= char <= "~" and char not in "\t\r\n"]
    if not other:
        return 1.0
    return sum(_usual(char, encoding) for char in other) / len(other)


def _usual(char, encoding):
    if char in "，。、；：？！“”‘’（）《》「」『』…—·　":
        return True
    if encoding == "utf-8":
        return char not in "\0\ufffd"            # in another encoding nearly all is U+FFFD
    if encoding == "cp1252":
        return char in "‘’“”–—…€£°§©®«»·" or "LATIN" in unicodedata.name(char, "")
    if encoding == "shift_jis" and "\u3040" <= char <= "\u30ff":
        return True
    if encoding == "euc_kr":
        return "\uac00" <= char <= "\ud7a3"
    # the first level of GB 2312 and of Big5: the some four thousand characters of daily use
    return _lead_byte(char, "gb2312", 0xB0, 0xD7) or _lead_byte(char, "big5", 0xA4, 0xC6)


def _lead_byte(char, encoding, first, last):
    try:
        return first <= char.encode(encoding)[0] <= last
    except UnicodeEncodeError:
        return False
