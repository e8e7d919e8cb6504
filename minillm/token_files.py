"""The format of the token files: train.bin, val.bin, and meta.json beside them.

    write_meta(folder, "pretrain", tokenizer, settings, splits, sources, report)
    meta = read_meta("data/pretrain")

Tokens are little-endian uint16 without a header; <|endoftext|> ends every document. SFT adds
train_mask.bin and val_mask.bin (uint8 of the same length: 1 on supervised tokens) and its rows are
block_size + 1 tokens. meta.json states the tokenizer's hash and path, the vocabulary, the counts of
each split, the sources, the seed, and what was skipped, repaired and left out.

Version 2 (without a number: 1, whose folders still train) added `version`, `left_out` and
`unknown_keys`, and for SFT `long`; a document may now be cut so that its end is for validation.
Later, without a new number: `content`, the sha256 of each .bin; `other_files`; `noted`; counts of
unknown keys in place of a list; `unknown_roles`.
"""
import hashlib
import json
import os

from minillm.errors import UserError
from minillm.report import counted

VERSION = 2
MAKERS = "prepare_pretrain.py and prepare_sft.py make it"


def write_meta(folder, kind, tokenizer, settings, splits, sources, report):
    """Write meta.json. `settings`: what else of the settings belongs to the files, as a dict."""
    meta = {
        "version": VERSION,
        "kind": kind,
        "tokenizer": settings.pop("tokenizer"),
        "tokenizer_hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        **settings,
        "splits": splits,
        "content": {name: sha256_of(os.path.join(folder, name))
                    for name in sorted(os.listdir(folder)) if name.endswith(".bin")},
        "sources": sources,
        **report.summary(),
    }
    path = os.path.join(folder, "meta.json")
    # a file's name need not be UTF-8; what it becomes here is the very escape that JSON has for it
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(meta, file, ensure_ascii=False, indent=2)


def read_meta(folder):
    """meta.json of a data folder, checked for what training needs of it."""
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8-sig") as file:
            meta = json.load(file)
        _check_meta(meta)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {MAKERS}") from None
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: prepare the data again") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({why}): prepare the data again") from None
    if not 0 < meta["vocab_size"] <= 65535:
        size = meta["vocab_size"]
        raise UserError(f"{path}: a vocabulary of {size} does not fit into uint16 token files")
    if meta.get("version", 1) > VERSION:
        raise UserError(f"{path} has version {meta['version']}, "
                        f"this program reads {VERSION} at most: "
                        "update it, or prepare the data again")
    return meta


def _check_meta(meta):
    """Raise ValueError, TypeError or KeyError where something is absent or of another type."""
    if meta["kind"] not in ("pretrain", "sft"):
        raise ValueError(f"kind {meta['kind']!r}")
    counts = [meta["vocab_size"], meta.get("version", 1)]
    counts += [meta["splits"][split]["tokens"] for split in ("train", "val")]
    if meta["kind"] == "sft":
        counts.append(meta["block_size"])
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"counts {counts}")
    if not all(type(meta[key]) is str for key in ("tokenizer", "tokenizer_hash")):
        raise ValueError("the tokenizer's path and hash are text")


def fingerprint(meta):
    """A short hash of what was prepared: tokenizer, seed, counts, tokens. Paths do not enter."""
    parts = [meta["kind"], meta["tokenizer_hash"], meta.get("seed"), meta.get("block_size"),
             meta["splits"]]
    if "content" in meta:                        # older folders have none
        parts.append(meta["content"])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_splits(splits, val_fraction, report):
    """Raise UserError where there is nothing to train on; the reason comes first."""
    train, val = splits["train"]["documents"], splits["val"]["documents"]
    if train:
        return
    skipped = report.in_a_line()
    if not val:
        reason = f" ({skipped})" if skipped else ""
        raise UserError(f"the input holds no document{reason}")
    reason = f"{skipped}; " if skipped else ""
    raise UserError(f"{reason}nothing is left for training: {counted(val, 'documents')}, or copies "
                    f"of one, went into validation by --val_fraction={val_fraction}: bring more, "
                    "or choose a smaller fraction (0: no validation)")


def print_summary(out_dir, splits, report):
    """Print what was written, and what was skipped, repaired or left out."""
    print(f"wrote {out_dir}")
    for name, counts in splits.items():
        numbers = [counted(value, key.replace("_", " ")) for key, value in counts.items()]
        print(f"  {name}: {', '.join(numbers)}")
    for line in report.lines():
        print(line)
