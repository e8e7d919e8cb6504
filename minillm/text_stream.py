"""Token ids → text as they come: whole characters only, and nothing from a stop string on."""
import codecs
import sys


class TextStream:
    """Turns ids into text, a piece per id. Whole characters only.

    `stopped` becomes True when one of the strings in `stop` has been made; it is not shown. What
    may be the beginning of one is held back until that is clear.
    """

    def __init__(self, tokenizer, stop=()):
        self.decoder = StreamDecoder(tokenizer)
        self.stop = tuple(stop)
        self.held, self.stopped = "", False

    def push(self, token):
        """The text that token completes, often ''."""
        return self._pass(self.decoder.push(token))

    def flush(self):
        """What is left at the end."""
        text = self._pass(self.decoder.flush())
        text, self.held = text + self.held, ""
        return text

    def _pass(self, text):
        """Add `text`; return what can be shown of what was held."""
        if self.stopped:
            return ""
        text = self.held + text
        found = [text.find(stop) for stop in self.stop if stop in text]
        if found:
            self.held, self.stopped = "", True
            return text[:min(found)]
        keep = len(text) - self._begun(text)
        self.held = text[keep:]
        return text[:keep]

    def _begun(self, text):
        """How many characters at the end of `text` may be the beginning of a stop string."""
        longest = 0
        for stop in self.stop:
            for n in range(1, len(stop)):
                if text.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest


class StreamDecoder:
    """Text out of tokens as they come, whole characters only.

    `push(token)` returns the text that is complete by now, `flush()` ends. Bytes that cannot become
    a character are dropped: no U+FFFD appears that the tokens do not spell. Special tokens give "".
    """

    def __init__(self, tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def push(self, token):
        return self._decoder.decode(self._token_bytes[token])

    def flush(self):
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def printable(text):
    """`text` without control characters: a model must not be able to drive the terminal."""
    shown = []
    for char in text:
        control = char < " " or "\x7f" <= char < "\xa0"
        if char in "\n\t" or not control:
            shown.append(char)
    return "".join(shown)


def show(text):
    """Print a model's text at once: into a terminal its printable part, else every character."""
    if sys.stdout.isatty():
        text = printable(text)
    print(text, end="", flush=True)
