"""Prepare text for pretraining: token files, shuffled and split, one flat stream of uint16.

    python prepare_pretrain.py corpus.jsonl --tokenizer=data/tokenizer --out_dir=data/pretrain
    python prepare_pretrain.py                       # the embedded demo corpus

Reads .jsonl, .json and .ndjson (one record per line, an array, or records one after the other),
.txt and .parquet, and folders of them; all but .parquet also as .gz, .bz2, .xz, .zst or in a tar. A
record holds its text under `text_key`, or is a text itself.

Writes train.bin, val.bin (little-endian uint16, no header, <|endoftext|> after every document) and
meta.json. The bytes depend on the input, the tokenizer and the seed alone, not on the number of
processes. The text is read once, streaming. Until it is done, the shuffle takes as much disk again
as the token files. The old files stay until the new ones are complete.

Exit status: 0; 2 after a mistake that you can correct, with one line on stderr; 130 after Ctrl-C.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tqdm import tqdm

from minillm.atomic_folder import replaced_folder
from minillm.configurator import BelowOne, Positive, configure, positional, whole
from minillm.documents import Document, columns
from minillm.encode_ahead import default_processes, encode_ahead
from minillm.errors import run
from minillm.report import Report
from minillm.shuffle import DiskShuffle, content_digest
from minillm.split import ValidationSplit
from minillm.text_files import Block, Source, batches_of
from minillm.text_reader import TEXT_KEY_HINT, block_documents, check_text_keys
from minillm.token_files import check_splits, print_summary, write_meta
from minillm.tokenizer import END_OF_TEXT, Tokenizer, pack_ids

try:
    from minillm.speed.batch_tokenizer import BatchTokenizer
except ImportError:                              # minillm/speed was deleted
    BatchTokenizer = Tokenizer                   # the same ids, slower


@dataclass
class Settings:
    files: list[str] = positional()   # files or folders of text; none: the demo's
    tokenizer: str | None = None      # its folder; default data/tokenizer, or data/demo/tokenizer
    out_dir: str | None = None        # default data/pretrain, or data/demo/pretrain without FILE
    val_fraction: BelowOne = 0.01     # share for validation, chosen by a hash of each document
    seed: int = 1337                  # of the order of the documents
    dedup: bool = False               # drop exact copies of a document
    text_key: str = "text"            # key of the text in JSON; several are joined: title,content
    document: Literal["file", "paragraph", "line"] = "file"  # what counts as one in a .txt
    encoding: str = "utf-8"           # of the input, e.g. gb18030; a byte order mark overrides it
    strict: bool = False              # stop at the first line that would be skipped
    processes: whole(0, 1000) = 0     # how many encode; 0: one per core, or one for a small input
    batch_size: Positive = 1_000_000  # bytes encoded in one call: affects speed and memory only


FILES = {"train.bin", "val.bin", "meta.json"}
_END = pack_ids([END_OF_TEXT])
SENTENCE_ENDS = tuple(mark.encode("utf-8") for mark in "。！？.!?")


def main():
    s = configure(Settings)
    begun = time.perf_counter()
    where = "data" if s.files else "data/demo"
    s.tokenizer, s.out_dir = s.tokenizer or f"{where}/tokenizer", s.out_dir or f"{where}/pretrain"
    tokenizer = BatchTokenizer.load(s.tokenizer)
    report = Report(s.strict, TEXT_KEY_HINT, s.encoding)
    source = Source(s.files, report, s.encoding, s.document) if s.files else None
    blocks = source.blocks(s.batch_size) if source else demo_blocks()
    batches = batches_of(blocks, s.batch_size)
    encode = partial(encode_blocks, tokenizer, s.text_key, s.strict)
    size = source.size if source else 0
    processes = s.processes or default_processes(size)
    with replaced_folder(s.out_dir, FILES) as folder:
        # 1) read, encode, and put in buckets on the disk
        on_duplicate = partial(report.skip, "duplicate of an earlier document")
        shuffle = DiskShuffle(os.path.join(folder, "buckets"), s.seed, s.dedup, on_duplicate)
        split = ValidationSplit(s.val_fraction, may_cut=True)
        characters, encoded = 0, 0               # characters and tokens, with the duplicates
        # by bytes of the input, or by characters of the demo; no bar without a terminal
        with tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            for documents, length, block_report in encode_ahead(encode, batches, processes):
                report.merge(block_report)
                characters += length
                encoded += sum(map(len, documents.payloads)) // 2
                shuffle.add(documents)
                split.count(documents)
                bar.update((source.position if source else characters) - bar.n)
        # 2) read the buckets, and write the files
        split.decide()
        splits = write_splits(folder, shuffle, split, tokenizer)
        check_splits(splits, s.val_fraction, report)
        check_text_keys(s.text_key, report)
        settings = {key: getattr(s, key) for key in ("tokenizer", "seed", "val_fraction", "dedup")}
        sources = s.files or ["demo.town.biographies()"]
        write_meta(folder, "pretrain", tokenizer, settings, splits, sources, report)
    print_summary(s.out_dir, splits, report)
    seconds = time.perf_counter() - begun
    n_bytes = splits["train"]["bytes"] + splits["val"]["bytes"]
    print(f"  {characters / encoded:.3f} characters per token, {seconds:.1f} s "
          f"({n_bytes / seconds / 1e6:.2f} MB/s)")


def demo_blocks():
    from demo.town import demo_documents                 # only the demo needs the town
    yield Block("texts", "demo", 1, list(demo_documents()))


def encode_blocks(tokenizer, text_key, strict, blocks):
    """Blocks → (Documents, number of characters, Report of what was skipped or repaired)."""
    report, texts = Report(strict), []
    for block in blocks:
        texts += block_documents(block, report, text_key)
    documents = columns(encode_documents(tokenizer, texts))
    return documents, sum(len(text) for _, text in texts), report


def encode_documents(tokenizer, texts):
    """[(file:line, text)] → [Document], with the ids and <|endoftext|> as payload, uint16."""
    documents = []
    packed = tokenizer.encode_packed([text for _, text in texts])
    for (place, text), ids in zip(texts, packed):
        content = text.encode("utf-8")
        documents.append(Document(content_digest(content), len(content), ids + _END, place))
    return documents


class SplitWriter:
    """Writes the file of one split, and counts for meta.json."""

    def __init__(self, folder, name):
        self._file = open(os.path.join(folder, f"{name}.bin"), "wb", 1 << 20)
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def add(self, tokens, size):
        self._file.write(tokens)
        self.counts["documents"] += 1
        self.counts["tokens"] += len(tokens) // 2
        self.counts["bytes"] += size

    def close(self):
        self._file.close()


def write_splits(folder, shuffle, split, tokenizer):
    """Empty the shuffle into train.bin and val.bin; returns {split: counts} for meta.json."""
    train, val = SplitWriter(folder, "train"), SplitWriter(folder, "val")
    for documents in shuffle.shuffled():
        in_validation = split.in_validation(documents).tolist()
        to_cut = split.to_cut(documents)
        sizes = documents.sizes.tolist()
        for index, (tokens, size) in enumerate(zip(documents.payloads, sizes)):
            if in_validation[index]:
                val.add(tokens, size)
            elif index in to_cut and (cut := cut_point(tokens, to_cut[index], tokenizer)):
                start, size_of_end = cut
                train.add(bytes(tokens[:start]) + _END, size - size_of_end)
                val.add(tokens[start:], size_of_end)
            else:
                train.add(tokens, size)
    train.close()
    val.close()
    return {"train": train.counts, "val": val.counts}


def cut_point(tokens, wanted, tokenizer):
    """Where to cut packed tokens so that about `wanted` bytes of text come after the cut.

    At the nearest line end; if that is too far off, at a sentence end; otherwise between two
    characters. Returns (the place in `tokens`, the bytes of text after it), or None if there is no
    place: the text is a single token, or a single character.
    """
    ids = memoryview(tokens).cast("H")[:-1].tolist()
    # kind of place → (distance in bytes from `wanted`, place, bytes after it)
    candidates = {}
    behind = 0
    for place in range(len(ids) - 1, 0, -1):
        behind += len(tokenizer.token_bytes[ids[place]])
        before = tokenizer.token_bytes[ids[place - 1]]
        after = tokenizer.token_bytes[ids[place]]
        if before.endswith(b"\n"):
            kind = "line"
        elif before.endswith(SENTENCE_ENDS):
            kind = "sentence"
        elif not 0x80 <= after[0] < 0xC0:                # not inside a character
            kind = "character"
        else:
            continue
        found = (abs(behind - wanted), place, behind)
        candidates[kind] = min(candidates.get(kind, found), found)
        if behind > 4 * wanted and candidates.keys() >= {"line", "character"}:
            break
    if not candidates:
        return None
    for kind in ("line", "sentence", "character"):
        if kind in candidates and wanted / 2 <= candidates[kind][2] <= 2 * wanted:
            break
    else:
        kind = min(candidates, key=candidates.get)
    _, place, size = candidates[kind]
    return 2 * place, size


if __name__ == "__main__":
    run(main)
