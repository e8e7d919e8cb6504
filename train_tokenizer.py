"""Train the tokenizer: byte-level BPE on a sample of the text.

    python train_tokenizer.py data/raw/corpus.jsonl --vocab_size=32000 --out_dir=data/tokenizer
    python train_tokenizer.py                        # the embedded demo corpus

Writes tokenizer.json and tokenizer_config.json, the latter with the chat template for transformers.
Files of conversations serve as well as files of text. Of an input larger than max_bytes the sample is
spread evenly over the whole of it. The same input gives the same tokenizer.
"""
import sys
import time
from dataclasses import dataclass

from tokenizers import pre_tokenizers, trainers

import tokenizer as tokenizer_module
from configurator import UserError, configure, positional, run
from output_folder import replaced_folder
from prepare_pretrain import demo_documents, progress
from prepare_sft import demo_conversations
from text_reader import Report, Source, documents


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
            backend = train(sample, s.vocab_size, s.nfkc)
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


def train(texts, vocab_size, nfkc=False):
    """A tokenizers.Tokenizer trained on an iterable of texts. Memory grows with the different pre-tokens in
    them, for which reason they are cut shorter here than in encoding; see tokenizer.py."""
    backend = tokenizer_module.untrained(nfkc, tokenizer_module.HAN_RUN_TRAINING)
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=tokenizer_module.SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),       # all 256 bytes: every string can be encoded
        show_progress=sys.stderr.isatty(),
    ))
    backend.pre_tokenizer = tokenizer_module.untrained(nfkc).pre_tokenizer
    return backend


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
