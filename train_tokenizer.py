"""Train the tokenizer: byte-level BPE on a sample of the text.

    python train_tokenizer.py data/raw/corpus.jsonl --vocab_size=32000 --out_dir=data/tokenizer
    python train_tokenizer.py                        # the embedded demo corpus

Writes tokenizer.json and tokenizer_config.json, the latter with the chat template for transformers.
Files of conversations serve as well as files of text. Of an input larger than max_bytes the sample is
spread evenly over the whole of it. The same input gives the same tokenizer. Memory stays under 4 GiB
whatever max_bytes is: pieces of text that are rare are counted in halves (see count_pieces).
"""
import sys
import time
from collections import Counter
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers, trainers

from minillm import tokenizer as tokenizer_module
from minillm.configurator import configure, positional
from minillm.errors import UserError, run
from minillm.atomic_folder import replaced_folder
from prepare_pretrain import demo_documents, progress
from prepare_sft import demo_conversations
from minillm.text_reader import Report, Source, documents


@dataclass
class Settings:
    files: list[str] = positional()      # files or directories: .jsonl .json .txt, plain, .gz .bz2 .xz or in a tar; none: the demo corpus
    out_dir: str | None = None           # where the tokenizer goes; default data/tokenizer, or data/demo/tokenizer without FILE
    vocab_size: int | None = None        # tokens, the 3 special ones and the 256 bytes included; default 32000, or 1200 without FILE
    max_bytes: int = 1_000_000_000       # of text sampled, evenly over the input
    nfkc: bool = False                   # fold full-width letters, ligatures … (NFKC): fewer forms, but decode(encode(s)) is not s
    text_key: str = "text"               # the key of the text in JSON lines
    encoding: str = "utf-8"              # of the input, e.g. gb18030; a line that is not is skipped
    strict: bool = False                 # stop at the first line that would be skipped


FILES = {"tokenizer.json", "tokenizer_config.json"}
PIECES_BYTES = 25 << 20              # of all different pieces; the trainer takes some 110 bytes for each, so 2.7 GiB
HAN_RUN = 16                         # characters; no token is longer than the runs that it is learned from
HAN_RUN_DEMO = 4                     # a small town has few phrases, and they would fill its small vocabulary


def main():
    s = configure(Settings)
    begun = time.perf_counter()
    where = "data" if s.files else "data/demo"
    s.out_dir, s.vocab_size = s.out_dir or f"{where}/tokenizer", s.vocab_size or (32000 if s.files else 1200)
    if not 259 <= s.vocab_size <= tokenizer_module.MAX_VOCAB:
        raise UserError(f"--vocab_size={s.vocab_size} must be between 259 (3 special tokens and 256 bytes) and "
                        f"{tokenizer_module.MAX_VOCAB} (token files are uint16)")
    if s.max_bytes < 1:
        raise UserError(f"--max_bytes={s.max_bytes} must be positive")
    report = Report(s.strict)
    source = Source(s.files, report, s.encoding) if s.files else None
    with replaced_folder(s.out_dir, FILES) as folder:
        with progress(source) as bar:
            sample = Sample(source, s, report, bar)
            backend = train(sample, s.vocab_size, s.nfkc, HAN_RUN if s.files else HAN_RUN_DEMO)
        if not sample.bytes:
            raise UserError(f"the input holds no text (--text_key={s.text_key})" + "".join(f";{line}" for line in report.lines()))
        tokenizer_module.save(backend, folder)
    tokenizer = tokenizer_module.Tokenizer.load(s.out_dir)
    print(f"wrote {s.out_dir}: {tokenizer.vocab_size:,} tokens from {sample.documents:,} documents, "
          f"{sample.bytes / 1e6:.1f} MB of text, {time.perf_counter() - begun:.1f} s")
    if tokenizer.vocab_size < s.vocab_size:
        print(f"  fewer than the {s.vocab_size:,} asked for: the text holds no more pairs that occur twice")
    for line in report.lines():
        print(line)


def train(texts, vocab_size, nfkc=False, han_run=HAN_RUN):
    """A tokenizers.Tokenizer trained on an iterable of texts, in memory that does not grow with them."""
    backend = tokenizer_module.untrained(nfkc)
    encoding = backend.normalizer, backend.pre_tokenizer
    counts = count_pieces(texts, backend.normalizer, han_run)
    # the trainer is given the pieces as they are, each on a line of its own
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.train_from_iterator(written_out(counts), trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=tokenizer_module.SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),       # all 256 bytes: every string can be encoded
        show_progress=sys.stderr.isatty(),
    ))
    backend.normalizer, backend.pre_tokenizer = encoding
    return backend


def count_pieces(texts, normalizer=None, han_run=HAN_RUN, limit=PIECES_BYTES):
    """How often each pre-token occurs in the texts: a Counter.

    Han has no spaces, so most runs of it occur once, and the trainer would keep every one. Where the
    pieces come to more than `limit` bytes, those that have occurred least are cut in half, and again.
    """
    split = pre_tokenizers.Split(Regex(tokenizer_module.pre_token_pattern(han_run)), "isolated")
    counts, look = Counter(), limit // 100
    for text in texts:
        if normalizer:
            text = normalizer.normalize_str(text)
        for part in tokenizer_module.cut(text):
            counts.update(piece for piece, _ in split.pre_tokenize_str(part))
            if len(counts) > look:
                halve_rare(counts, limit)
                look = 1.1 * len(counts)
    halve_rare(counts, limit)
    return counts


def halve_rare(counts, limit):
    """If the pieces come to more than `limit` bytes, cut the rarest in half until they come to 7/10 of it."""
    rare, size = 1, _bytes(counts)
    if size <= limit:
        return
    while size > 0.7 * limit and rare < 1 << 40:         # single characters, which cannot be cut, may be more
        for piece in [piece for piece, count in counts.items() if count <= rare and len(piece) > 1]:
            count, middle = counts.pop(piece), len(piece) // 2
            counts[piece[:middle]] += count
            counts[piece[middle:]] += count
        before, size = size, _bytes(counts)
        if size > 0.9 * before:
            rare *= 2


def _bytes(counts):
    return sum(len(piece.encode("utf-8")) for piece in counts)


def written_out(counts, size=1 << 17):
    """Yield texts of about `size` characters in which every piece stands on as many lines as it was counted. Empties `counts`."""
    lines, length = [], 0
    while counts:
        piece, count = counts.popitem()
        if piece == "\n":                                # a byte of the alphabet, in need of no merge
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


def demo_texts(report):
    yield from demo_documents()
    for place, messages in demo_conversations(report):
        yield place, "\n".join(message["content"] for message in messages)


class Sample:
    """Iterates over the sampled texts. The first `f` of the input may give the first `f` of max_bytes (and a
    hundredth ahead); lines beyond that pass unparsed."""

    def __init__(self, source, settings, report, bar):
        self._source, self._settings, self._report, self._bar = source, settings, report, bar
        self.bytes = self.documents = 0

    def _wanted(self, line):
        share = self._source.position / max(1, self._source.size)
        return self.bytes < self._settings.max_bytes * min(1, share + 0.01)

    def __iter__(self):
        s = self._settings
        texts = documents(self._source, s.text_key, self._wanted, chats=True) if self._source else demo_texts(self._report)
        for _, text in texts:
            content = text.encode("utf-8")
            left = s.max_bytes - self.bytes
            if len(content) > left:              # the last text is cut, between two characters
                text = content[:left].decode("utf-8", errors="ignore")
                content = text.encode("utf-8")
            self.bytes += len(content)
            self.documents += 1
            self._bar.update((self._source.position if self._source else self.bytes) - self._bar.n)
            yield text
            if self.bytes + 4 > s.max_bytes:
                break


if __name__ == "__main__":
    run(main)
