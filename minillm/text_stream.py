"""Token ids → text as they come: whole characters only, and nothing from a stop string on."""
import codecs
import re
import sys

CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")      # all but the tab and the line end


class TextStream:
    """Turns ids into text, a piece per id. Special tokens have none.

    Bytes that cannot become a character are dropped: no U+FFFD appears that the tokens do not
    spell. `stopped` becomes True when one of the strings in `stop` has been made; it is not shown.
    What may be the beginning of one is held back until that is clear.
    """

    def __init__(self, tokenizer, stop=()):
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self.stop = tuple(stop)
        self.held, self.stopped = "", False

    def push(self, token):
        """The text that token completes, often ''."""
        return self._pass(self.decoder.decode(self.token_bytes[token]))

    def flush(self):
        """What is left at the end."""
        text = self._pass(self.decoder.decode(b"", final=True))
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


def printable(text):
    """`text` without control characters: a model must not be able to drive the terminal."""
    return CONTROL.sub("", text)


def show(text):
    """Print a model's text at once: into a terminal its printable part, else every character."""
    if sys.stdout.isatty():
        text = printable(text)
    print(text, end="", flush=True)
