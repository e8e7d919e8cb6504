"""Train the tokenizer: byte-level BPE on a sample of the text.

    python train_tokenizer.py data/raw/corpus.jsonl --vocab_size=32000 --out_dir=data/tokenizer
    python train_tokenizer.py --special_tokens="<think>,</think>" corpus.jsonl
    python train_tokenizer.py                        # the embedded demo corpus

Reads what prepare_pretrain.py and prepare_sft.py read: texts and conversations. Writes
tokenizer.json and tokenizer_config.json, the latter with the chat template for transformers. If the
input is larger than max_bytes, a sample of it is read, spread evenly over the input. The same input
gives the same tokenizer, on any number of processes. Memory stays under 4 GiB for any max_bytes.
Time: 64 MB take 70 seconds of one core: 28 to count the pieces, which up to four cores share, and
42 to learn the merges from at most 25 MB of pieces. 1 GB took 7 minutes on two cores that had other
work, too. A smaller max_bytes takes less time.

Exit status: 0; 2 after a mistake that you can correct, with one line on stderr; 130 after Ctrl-C.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import tokenizers
from tokenizers import Regex, pre_tokenizers, trainers
from tqdm import tqdm

from minillm import tokenizer as tokenizer_module
from minillm.atomic_folder import replaced_folder
from minillm.chat_names import Names
from minillm.configurator import Positive, configure, positional, whole
from minillm.encode_ahead import default_processes, encode_ahead
from minillm.errors import UserError, run
from minillm.report import Report, counted
from minillm.text_files import BLOCK, Block, Source
from minillm.text_reader import TEXT_KEY_HINT, block_documents, check_text_keys
from minillm.tokenizer import MAX_VOCAB, SPECIAL_TOKENS, Tokenizer


@dataclass
class Settings:
    files: list[str] = positional()   # files or folders of text or conversations; none: the demo's
    out_dir: str | None = None        # default data/tokenizer, or data/demo/tokenizer
    vocab_size: whole(259, MAX_VOCAB) | None = None  # number of tokens; auto: 32000, demo 1200
    special_tokens: str = ""          # more of them, as "<think>,</think>": one token each
    max_bytes: Positive = 1_000_000_000  # bytes of text in the sample
    nfkc: bool = False                # fold full-width letters and ligatures; decode cannot undo it
    text_key: str = "text"            # key of the text in JSON; several are joined: title,content
    document: Literal["file", "paragraph", "line"] = "file"  # what counts as one in a .txt
    map: str = ""                     # names of roles and keys in your files: q:user,a:assistant
    encoding: str = "utf-8"           # of the input, e.g. gb18030; a byte order mark overrides it
    strict: bool = False              # stop at the first line that would be skipped
    processes: whole(0, 1000) = 0     # how many count; 0: one per core up to 4; small input: 1


BATCH = 1 << 20                      # characters counted in one call
LARGE = 256 << 20                    # a sample of more bytes is counted in larger calls
LARGE_BATCH = 8 << 20                # characters in one of these; it also halves rare pieces
FILES = {"tokenizer.json", "tokenizer_config.json"}
PIECES_BYTES = 25 << 20              # of all different pieces; the trainer takes 110 times as much
# Runs of characters that the tokens are learned from, see pre_token_pattern: no token is longer
HAN_RUN, WORD, OTHER = 16, 24, 16
# the demo's town has few phrases, and whole phrases would fill its vocabulary
HAN_RUN_DEMO = 4


def main():
    s = configure(Settings)
    begun = time.perf_counter()
    where = "data" if s.files else "data/demo"
    s.out_dir = s.out_dir or f"{where}/tokenizer"
    s.vocab_size = s.vocab_size or (32000 if s.files else 1200)
    special = check_special(s.special_tokens, s.vocab_size)
    report = Report(s.strict, TEXT_KEY_HINT, s.encoding)
    source = Source(s.files, report, s.encoding, s.document) if s.files else None
    sample = Sample(source, s, report)
    with replaced_folder(s.out_dir, FILES) as folder:
        counts = count_sample(sample, source, s, special)
        if not sample.bytes:
            reasons = "".join(f"; {line.strip()}" for line in report.lines())
            raise UserError(f"the input holds no text (--text_key={s.text_key}){reasons}")
        check_text_keys(s.text_key, report)
        backend = train_on(counts, s.vocab_size, s.nfkc, special)
        tokenizer_module.save(backend, folder)
    tokenizer = Tokenizer.load(s.out_dir)
    print(f"wrote {s.out_dir}: "
          f"{tokenizer.vocab_size:,} tokens from {counted(sample.documents, 'documents')}, "
          f"{sample.bytes / 1e6:.1f} MB of text, {time.perf_counter() - begun:.1f} s")
    if tokenizer.vocab_size < s.vocab_size:
        print(f"  fewer than the {s.vocab_size:,} asked for: "
              "the text holds no more pairs that occur twice")
    for line in report.lines():
        print(line)


def check_special(text, vocab_size):
    """The list of additional special tokens. UserError where one can't be told from other text."""
    special = [token.strip() for token in text.split(",") if token.strip()]
    for token in special:
        others = SPECIAL_TOKENS + [other for other in special if other is not token]
        if not is_utf8(token):
            raise UserError(f"--special_tokens: {token!r} is not UTF-8 text")
        if len(token) < 3 or any(char.isspace() for char in token):
            raise UserError(f"--special_tokens: {token!r} must be 3 characters or more, "
                            "without spaces")
        for other in others:
            if token in other or other in token:
                raise UserError(f"--special_tokens: {token!r} collides with {other!r}")
    if 259 + len(special) > vocab_size:
        raise UserError(f"--vocab_size={vocab_size} must be at least {259 + len(special)}, "
                        "for the special tokens and 256 bytes")
    return special


def is_utf8(text):
    """Whether it has no lone surrogate, such as Python makes of arguments that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeError:
        return False
    return True


def demo_blocks():
    from demo.town import conversations, demo_documents  # only the demo needs the town
    yield Block("texts", "demo", 1, list(demo_documents()))
    records = [(f"demo:{number}", record) for number, record in enumerate(conversations(), 1)]
    yield Block("records", "demo", 1, records)


class Sample:
    """Iterates over the sampled texts, which are spread evenly over the input.

    From the first x% of the input it takes at most the first (x + 1)% of max_bytes; blocks beyond
    that pass unparsed. `bytes` and `documents` say how much was taken so far.
    """

    def __init__(self, source, settings, report):
        self._source, self._settings, self._report = source, settings, report
        self._names = Names(settings.map)
        self.bytes = self.documents = 0

    def __iter__(self):
        if not self._source:
            for block in demo_blocks():
                yield from self._texts_of(block)
            return
        # small blocks for a small input, so that the sample is spread evenly
        for block in self._source.blocks(min(BLOCK, max(1 << 12, self._source.size // 500))):
            if self._may_take():
                yield from self._texts_of(block)

    def _may_take(self):
        """Whether there is room for more texts from this place of the input."""
        share = 1.0
        if self._source:
            share = min(1, self._source.position / max(1, self._source.size) + 0.01)
        # a character may take 4 bytes, so the last 3 may stay untaken
        return (self.bytes < int(self._settings.max_bytes * share)
                and self.bytes + 4 <= self._settings.max_bytes)

    def _texts_of(self, block):
        for _, text in block_documents(block, self._report, self._settings.text_key, self._names):
            if not self._may_take():
                return
            content = text.encode("utf-8")
            left = self._settings.max_bytes - self.bytes
            if len(content) > left:              # the last text is cut, between two characters
                text = content[:left].decode("utf-8", errors="ignore")
                content = text.encode("utf-8")
            self.bytes += len(content)
            self.documents += 1
            yield text


def count_sample(sample, source, s, special):
    """The Counter of the pieces of a sample."""
    size = source.size if source else 0
    large = min(size, s.max_bytes) > LARGE
    batch, limit = (LARGE_BATCH, PIECES_BYTES // 2) if large else (BATCH, PIECES_BYTES)
    count = partial(count_pieces, nfkc=s.nfkc, han_run=HAN_RUN if source else HAN_RUN_DEMO,
                    special=special, limit=limit)
    # the fifth would wait for this process, which adds up what they find
    processes = s.processes or min(4, default_processes(size))

    def counts_of_batches():
        with tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            for counts in encode_ahead(count, in_batches(sample, batch), processes):
                yield counts
                bar.update((source.position if source else sample.bytes) - bar.n)
    return add_up(counts_of_batches(), PIECES_BYTES)


def in_batches(texts, size):
    """Lists of consecutive texts, each of about `size` characters."""
    batch, total = [], 0
    for text in texts:
        batch.append(text)
        total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def count_pieces(texts, nfkc=False, han_run=HAN_RUN, special=(), limit=PIECES_BYTES):
    """How often each pre-token occurs in the texts: a Counter, without the special tokens.

    Han has no spaces, so most runs of it occur once, and the trainer would keep every one. If the
    pieces exceed `limit` bytes, those that have occurred least are cut in half, repeatedly.
    """
    normalizer = tokenizer_module.untrained(nfkc).normalizer
    pattern = tokenizer_module.pre_token_pattern(han_run, WORD, OTHER)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    apart = re.compile("|".join(map(re.escape, special))) if special else None

    def pieces(text):
        if normalizer:
            text = normalizer.normalize_str(text)
        for part in apart.split(text) if apart else [text]:
            for short_text in tokenizer_module.cut(part):
                yield from (piece for piece, _ in split.pre_tokenize_str(short_text))
    return add_up(map(pieces, texts), limit)


def add_up(parts, limit):
    """The Counter of all parts, which are pieces or Counters of them, in bounded memory."""
    counts, look = Counter(), limit // 100
    for part in parts:
        counts.update(part)
        if len(counts) > look:
            halve_rare(counts, limit)
            look = 1.1 * len(counts)
    halve_rare(counts, limit)
    return counts


def halve_rare(counts, limit):
    """If the pieces exceed `limit` bytes, cut the rarest in half until they take 7/10 of it."""
    rare, size = 1, _bytes(counts)
    if size <= limit:
        return
    # single characters, which cannot be cut, may be more
    while size > 0.7 * limit and rare < 1 << 40:
        for piece in [piece for piece, count in counts.items() if count <= rare and len(piece) > 1]:
            count, middle = counts.pop(piece), len(piece) // 2
            counts[piece[:middle]] += count
            counts[piece[middle:]] += count
        before, size = size, _bytes(counts)
        if size > 0.9 * before:
            rare *= 2


def _bytes(counts):
    return len("".join(counts).encode("utf-8"))


def train_on(counts, vocab_size, nfkc=False, special=()):
    """A tokenizers.Tokenizer trained on the counts of pieces. Empties `counts`."""
    backend = tokenizer_module.untrained(nfkc)
    encoding = backend.normalizer, backend.pre_tokenizer
    # the trainer is given the pieces as they are, each on a line of its own
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),    # every string can be encoded
        show_progress=False,         # its bar panics where stdout is full or nobody reads it
    )
    with tqdm(desc="learning the merges", bar_format="{desc} …", leave=False, disable=None):
        backend.train_from_iterator(written_out(counts), trainer)
    backend.normalizer, backend.pre_tokenizer = encoding
    if not special:
        return backend
    # control tokens are set by id alone; these are found in text
    data = json.loads(backend.to_str())
    for token in data["added_tokens"][len(SPECIAL_TOKENS):]:
        token["special"] = False
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def written_out(counts, size=1 << 17):
    """Yield texts of about `size` characters, a line for each time that a piece was counted.

    Empties `counts`.
    """
    lines, length = [], 0
    while counts:
        piece, count = counts.popitem()
        # "\n" separates the pieces; a byte is a token already, so it needs no merge
        if piece == "\n":
            continue
        while count:
            times = min(count, max(1, size // len(piece)))
            count -= times
            lines.append((piece + "\n") * times)
            length += times * len(piece)
            if length >= size:
                yield "".join(lines)
                lines, length = [], 0
    yield "".join(lines)


if __name__ == "__main__":
    run(main)
