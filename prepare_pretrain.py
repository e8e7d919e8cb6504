"""Text to token files for pretraining: shuffled, split, one flat stream of uint16.

    python prepare_pretrain.py data/raw/corpus.jsonl --tokenizer=data/tokenizer --out_dir=data/pretrain
    python prepare_pretrain.py                       # the embedded demo corpus

Writes train.bin, val.bin (little-endian uint16, no header, <|endoftext|> after every document) and
meta.json. The bytes depend on the input, the tokenizer and the seed alone. The text is read once,
streaming; shuffling goes by bucket files (token_files.py), which take, until the end, as much disk as
the token files themselves. The old files stay until the new ones are complete.
"""
import json
import os
import struct
import time
from dataclasses import dataclass

from tqdm import tqdm

from minillm.configurator import configure, positional
from minillm.errors import UserError, run
from minillm.atomic_folder import replaced_folder
from minillm.text_reader import Report, Source, documents
from minillm.token_files import Spool, digest, encode_ahead, in_batches
from minillm.tokenizer import END_OF_TEXT, MAX_PIECE, Tokenizer


@dataclass
class Settings:
    files: list[str] = positional()      # files or directories: .jsonl .json .txt, plain, .gz .bz2 .xz or in a tar; none: the demo corpus
    tokenizer: str | None = None         # folder of the tokenizer; default data/tokenizer, or data/demo/tokenizer without FILE
    out_dir: str | None = None           # where the token files go; default data/pretrain, or data/demo/pretrain without FILE
    val_fraction: float = 0.01           # share of the documents for validation, chosen by a hash of their content
    seed: int = 1337                     # of the shuffle
    dedup: bool = False                  # drop exact duplicates (no memory: equals meet on disk)
    text_key: str = "text"               # the key of the text in JSON lines
    encoding: str = "utf-8"              # of the input, e.g. gb18030; a line that is not is skipped
    strict: bool = False                 # stop at the first line that would be skipped
    batch_size: int = 1_000_000          # characters encoded in one call: speed and memory, never the result


FILES = {"train.bin", "val.bin", "meta.json"}


def main():
    s = configure(Settings)
    begun = time.perf_counter()
    where = "data" if s.files else "data/demo"
    s.tokenizer, s.out_dir = s.tokenizer or f"{where}/tokenizer", s.out_dir or f"{where}/pretrain"
    check(s)
    tokenizer = Tokenizer.load(s.tokenizer)
    report = Report(s.strict)
    source = Source(s.files, report, s.encoding) if s.files else None
    texts = documents(source, s.text_key) if s.files else demo_documents()
    with replaced_folder(s.out_dir, FILES) as folder:
        spool_folder = os.path.join(folder, "spool")
        os.mkdir(spool_folder)
        duplicate = lambda record: report.skip("duplicate of a document before", record.place)
        spool = Spool(spool_folder, s.seed, s.dedup, duplicate)
        characters = 0
        batches = in_batches(texts, lambda item: len(item[1]), s.batch_size)
        with progress(source) as bar:
            for encoded in encode_ahead(lambda batch: encode_documents(tokenizer, batch), batches):
                for place, length, content_digest, payload in encoded:
                    characters += length
                    spool.add(content_digest, payload, place)
                bar.update((source.position if source else characters) - bar.n)
        splits = write_splits(folder, spool, s.val_fraction)
        check_splits(splits, s.val_fraction, report)
        meta = {
            "kind": "pretrain", "tokenizer": s.tokenizer, "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size, "seed": s.seed, "val_fraction": s.val_fraction, "dedup": s.dedup,
            "splits": splits, "sources": s.files or ["demo_corpus.biographies()"],
            "skipped": report.skipped, "repaired": report.repaired,
        }
        write_meta(folder, meta)
    seconds = time.perf_counter() - begun
    tokens = splits["train"]["tokens"] + splits["val"]["tokens"]
    summary(s.out_dir, splits, report)
    print(f"  {characters / tokens:.3f} characters a token, {seconds:.1f} s "
          f"({sum(split['bytes'] for split in splits.values()) / seconds / 1e6:.2f} MB/s)")


def check(s):
    if not 0 <= s.val_fraction < 1:
        raise UserError(f"--val_fraction={s.val_fraction} must be at least 0 and below 1")
    if s.batch_size < 1:
        raise UserError(f"--batch_size={s.batch_size} must be positive")


def demo_documents():
    from demo.town import biographies
    for number, text in enumerate(biographies(), 1):
        yield f"demo:{number}", text


def progress(source):
    """A bar by bytes read of the input (by characters of the demo); none where stderr is no terminal."""
    return tqdm(total=source.size if source else None, unit="B", unit_scale=True, disable=None)


_SIZES = struct.Struct("<Q")         # UTF-8 bytes of the text, before its tokens in a record
_END = struct.pack("<H", END_OF_TEXT)


def encode_documents(tokenizer, batch):
    """[(place, text)] -> [(place, characters, digest, payload)], the payload being UTF-8 bytes and token ids."""
    short = iter(tokenizer.encode_batch([text for _, text in batch if len(text) <= MAX_PIECE]))
    result = []
    for place, text in batch:
        content = text.encode("utf-8")
        pieces = [next(short)] if len(text) <= MAX_PIECE else tokenizer.encode_pieces(text)
        tokens = b"".join(struct.pack(f"<{len(ids)}H", *ids) for ids in pieces)
        result.append((place, len(text), digest(content), _SIZES.pack(len(content)) + tokens + _END))
    return result


def write_splits(folder, spool, val_fraction):
    """Empty the spool into train.bin and val.bin; returns their counts for meta.json."""
    splits = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in ("train", "val")}
    with open(os.path.join(folder, "train.bin"), "wb", 1 << 20) as train, \
         open(os.path.join(folder, "val.bin"), "wb", 1 << 20) as val:
        for record in spool.shuffled():
            chosen = spool.in_validation(record, val_fraction)
            tokens = record.payload[_SIZES.size:]
            (val if chosen else train).write(tokens)
            counts = splits["val" if chosen else "train"]
            counts["documents"] += 1
            counts["tokens"] += len(tokens) // 2
            counts["bytes"] += _SIZES.unpack_from(record.payload)[0]
    return splits


def check_splits(splits, val_fraction, report):
    """Raise UserError where there is nothing to train on."""
    train, val = splits["train"]["documents"], splits["val"]["documents"]
    if not train + val:
        why = "; ".join(line.strip() for line in report.lines())
        raise UserError(f"the input holds no document{f' ({why})' if why else ''}")
    if not train:
        raise UserError(f"all {val:,} documents, or copies of one, fall into validation by --val_fraction={val_fraction}: "
                        f"bring more, or choose a smaller fraction (0: no validation)")


def write_meta(folder, meta):
    # a file's name need not be UTF-8; what it becomes here is the very escape that JSON has for it
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(meta, file, ensure_ascii=False, indent=2)


def summary(out_dir, splits, report):
    """Print what was written, and what was skipped or repaired."""
    print(f"wrote {out_dir}")
    for name, counts in splits.items():
        print(f"  {name}: " + ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items()))
    for line in report.lines():
        print(line)


if __name__ == "__main__":
    run(main)
