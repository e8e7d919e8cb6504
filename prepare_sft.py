"""Conversations to token files for supervised fine-tuning: encoded as ChatML, masked, packed into rows.

    python prepare_sft.py data/raw/chats.json --tokenizer=data/tokenizer --out_dir=data/sft --block_size=512
    python prepare_sft.py                            # the embedded demo conversations
    python prepare_sft.py --show=3                   # print three of them as a table of tokens, and write nothing

Writes train.bin, val.bin (rows of block_size + 1 little-endian uint16), train_mask.bin, val_mask.bin
(uint8 of the same length: 1 on the tokens to be learned, which are what the assistant says and its
<|im_end|>) and meta.json. Whole conversations are packed into rows, best fit first; each one ends in
an <|endoftext|>, which is how attention finds where the next begins, and so does the padding. One that
is longer than a row keeps its turns up to the last whole assistant turn that fits.

The bytes depend on the input, the tokenizer and the seed alone. Conversations are shuffled as in
prepare_pretrain.py, then packed POOL_TOKENS at a time: best-fit decreasing inside a pool, so memory is
one pool, and time grows linearly.
"""
import os
import struct
import sys
import time
from dataclasses import dataclass
from itertools import chain

import numpy as np

from minillm.configurator import configure, positional
from minillm.errors import UserError, run
from minillm.atomic_folder import replaced_folder
from prepare_pretrain import check, check_splits, progress, summary, write_meta
from minillm.text_reader import Report, Source, conversations
from minillm.token_files import Spool, digest, encode_ahead, in_batches
from minillm.tokenizer import END_OF_TEXT, IM_END, Tokenizer


@dataclass
class Settings:
    files: list[str] = positional()      # files or directories: .jsonl .json, plain, .gz .bz2 .xz or in a tar; none: the demo conversations
    tokenizer: str | None = None         # folder of the tokenizer; default data/tokenizer, or data/demo/tokenizer without FILE
    out_dir: str | None = None           # where the token files go; default data/sft, or data/demo/sft without FILE
    block_size: int | None = None        # window of the model: rows are one token longer; default 512, or 128 without FILE
    val_fraction: float = 0.01           # share of the conversations for validation, chosen by a hash of their content
    seed: int = 1337                     # of the shuffle
    dedup: bool = False                  # drop exact duplicates (no memory: equals meet on disk)
    encoding: str = "utf-8"              # of the input, e.g. gb18030; a line that is not is skipped
    strict: bool = False                 # stop at the first line that would be skipped
    batch_size: int = 1_000_000          # characters encoded in one call: speed and memory, never the result
    show: int = 0                        # print so many conversations as a token table, learned tokens marked, and stop


FILES = {"train.bin", "val.bin", "train_mask.bin", "val_mask.bin", "meta.json"}
POOL_TOKENS = 1 << 24                # packed at once; 48 MiB of tokens and mask


def main():
    s = configure(Settings)
    begun = time.perf_counter()
    where = "data" if s.files else "data/demo"
    s.tokenizer, s.out_dir = s.tokenizer or f"{where}/tokenizer", s.out_dir or f"{where}/sft"
    s.block_size = (512 if s.files else 128) if s.block_size is None else s.block_size
    check(s)
    if not 8 <= s.block_size <= 1 << 20:
        raise UserError(f"--block_size={s.block_size} must be at least 8, for a question and an answer, and at most {1 << 20:,}")
    if s.show < 0:
        raise UserError(f"--show={s.show} must be 0 or more")
    tokenizer = Tokenizer.load(s.tokenizer)
    report = Report(s.strict)
    source = Source(s.files, report, s.encoding) if s.files else None
    chats = conversations(source) if s.files else demo_conversations(report)
    if s.show:
        return show(tokenizer, chats, s.show)
    capacity = s.block_size + 1
    with replaced_folder(s.out_dir, FILES) as folder:
        spool_folder = os.path.join(folder, "spool")
        os.mkdir(spool_folder)
        duplicate = lambda record: report.skip("duplicate of a conversation before", record.place)
        spool = Spool(spool_folder, s.seed, s.dedup, duplicate)
        batches = in_batches(chats, lambda item: sum(len(message["content"]) for message in item[1]), s.batch_size)
        count = 0
        with progress(source) as bar:
            for encoded in encode_ahead(lambda batch: encode_conversations(tokenizer, batch, capacity), batches):
                for place, content_digest, payload, fit in encoded:
                    count += 1
                    if fit == "dropped":
                        report.skip("too long for a row, with its first answer", place)
                        continue
                    if fit == "truncated":
                        report.repair("later turns cut off to fit a row", place)
                    spool.add(content_digest, payload, place)
                bar.update((source.position if source else count) - bar.n)
        splits = write_splits(folder, spool, s.val_fraction, capacity)
        check_splits(splits, s.val_fraction, report)
        meta = {
            "kind": "sft", "tokenizer": s.tokenizer, "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size, "block_size": s.block_size, "seed": s.seed,
            "val_fraction": s.val_fraction, "dedup": s.dedup,
            "splits": splits, "sources": s.files or ["demo_corpus.conversations()"],
            "skipped": report.skipped, "repaired": report.repaired,
        }
        write_meta(folder, meta)
    summary(s.out_dir, splits, report)
    total = {key: splits["train"][key] + splits["val"][key] for key in splits["train"]}
    print(f"  padding {total['padding_tokens'] / total['tokens']:.2%} of tokens, learned {total['learned_tokens'] / total['tokens']:.2%}, "
          f"{time.perf_counter() - begun:.1f} s")


def demo_conversations(report):
    from demo.town import conversations as demo
    from minillm.text_reader import clean_conversation
    for number, record in enumerate(demo(), 1):
        messages = clean_conversation(record, report, f"demo:{number}")
        if messages:
            yield f"demo:{number}", messages


_SIZES = struct.Struct("<QQ")        # UTF-8 bytes of the contents, and of the learned ones, before the tokens and the mask


def encode_conversations(tokenizer, batch, capacity):
    """[(place, messages)] -> [(place, digest, payload, fit)]; fit is "whole", "truncated" or "dropped"."""
    # no token is longer than `longest` bytes, so what lies behind capacity * longest bytes cannot fit,
    # and a conversation of 50 MB need not be encoded to be told so
    longest = max(map(len, tokenizer.token_bytes))
    heads = [messages[:within(messages, capacity * longest)] for _, messages in batch]
    encoded = iter(tokenizer.encode_batch([message["content"] for head in heads for message in head]))
    result = []
    for (place, messages), head in zip(batch, heads):
        turns, whole, length = [], 0, 0                  # `whole`: how many turns, up to an assistant's, fit
        for message in head:
            turns.append((message["role"], ids := next(encoded)))
            before, behind = tokenizer.frame(message["role"])
            length += len(before) + len(ids) + len(behind)
            if message["role"] == "assistant" and length < capacity:         # and one <|endoftext|>
                whole = len(turns)
        fit = "whole" if whole == len(messages) else "truncated" if whole else "dropped"
        contents = [message["content"].encode("utf-8") for message in messages]
        name = b"\x1e".join(message["role"].encode() + b"\x1f" + content for message, content in zip(messages, contents))
        tokens, mask, sizes = [], [], {"system": 0, "user": 0, "assistant": 0}
        for (role, ids), content in zip(turns[:whole], contents):
            before, behind = tokenizer.frame(role)
            learned = b"\1" if role == "assistant" else b"\0"
            tokens += before, ids, behind
            mask += bytes(len(before)), learned * (len(ids) + 1), bytes(len(behind) - 1)
            sizes[role] += len(content)
        payload = b"".join([
            _SIZES.pack(sum(sizes.values()), sizes["assistant"]),
            np.fromiter(chain(*tokens, (END_OF_TEXT,)), "<u2").tobytes(), *mask, b"\0",
        ])
        result.append((place, digest(name), payload, fit))
    return result


def within(messages, limit):
    """How many leading messages have contents of at most `limit` characters together."""
    total = 0
    for number, message in enumerate(messages):
        total += len(message["content"])
        if total > limit:
            return number
    return len(messages)


def pack(lengths, capacity):
    """Best-fit decreasing (Johnson 1974) of items into rows: a list of rows, each a list of item indices.

    Every item, the longest first, goes into the fullest row with room for it. The rows are kept by
    the room they have left, which is a small integer, and a bit set says which rooms there are; so the
    time is linear in the number of items, and the same lengths always give the same rows.
    """
    rows, by_room, rooms = [], [[] for _ in range(capacity + 1)], 0
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    for item in order:
        length = lengths[item]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(item)
        room -= length
        by_room[room].append(row)
        rooms |= 1 << room
    return rows


class RowWriter:
    """One split: collects conversations into a pool, packs it, and writes its rows."""

    def __init__(self, folder, name, capacity):
        self._tokens = open(os.path.join(folder, f"{name}.bin"), "wb", 1 << 20)
        self._mask = open(os.path.join(folder, f"{name}_mask.bin"), "wb", 1 << 20)
        self._capacity, self._pool, self._pool_tokens = capacity, [], 0
        self.counts = dict.fromkeys(("documents", "tokens", "bytes", "learned_tokens", "learned_bytes", "rows", "padding_tokens"), 0)

    def add(self, payload):
        size, learned_size = _SIZES.unpack_from(payload)
        body = bytes(payload[_SIZES.size:])              # a copy, so that the bucket it came from can go
        length = len(body) // 3
        self._pool.append((np.frombuffer(body, "<u2", length), np.frombuffer(body, "u1", length, 2 * length)))
        self._pool_tokens += length
        self.counts["documents"] += 1
        self.counts["bytes"] += size
        self.counts["learned_bytes"] += learned_size
        if self._pool_tokens >= POOL_TOKENS:
            self._write_pool()

    def _write_pool(self):
        rows = pack([len(tokens) for tokens, _ in self._pool], self._capacity)
        for row in rows:
            tokens = np.full(self._capacity, END_OF_TEXT, "<u2")
            mask = np.zeros(self._capacity, "u1")
            at = 0
            for item in row:
                item_tokens, item_mask = self._pool[item]
                tokens[at: at + len(item_tokens)] = item_tokens
                mask[at: at + len(item_mask)] = item_mask
                at += len(item_tokens)
            self._tokens.write(tokens.tobytes())
            self._mask.write(mask.tobytes())
            self.counts["tokens"] += self._capacity
            self.counts["learned_tokens"] += int(mask.sum())
            self.counts["rows"] += 1
            self.counts["padding_tokens"] += self._capacity - at
        self._pool, self._pool_tokens = [], 0

    def close(self):
        self._write_pool()
        self._tokens.close()
        self._mask.close()


def write_splits(folder, spool, val_fraction, capacity):
    """Empty the spool into the rows of train and val; returns their counts for meta.json."""
    writers = {name: RowWriter(folder, name, capacity) for name in ("train", "val")}
    for record in spool.shuffled():
        writers["val" if spool.in_validation(record, val_fraction) else "train"].add(record.payload)
    for writer in writers.values():
        writer.close()
    return {name: writer.counts for name, writer in writers.items()}


def show(tokenizer, chats, count):
    """Print `count` conversations token by token: learned ones green and marked with *, control tokens blue."""
    color = sys.stdout.isatty()
    for number, (place, messages) in enumerate(chats, 1):
        ids, mask = tokenizer.encode_chat(messages)
        print(f"--- {place}: {len(ids)} tokens, {sum(mask)} learned (*)")
        for id, learned in zip(ids, mask):
            text = ascii(tokenizer.token_bytes[id])[2:-1] if b"\xef\xbf\xbd" in tokenizer.decode([id]).encode() else repr(tokenizer.decode([id], skip_special=False))[1:-1]
            paint = ("\033[32m" if learned else "\033[34m" if id <= IM_END else "\033[0m") if color else ""
            print(f"  {paint}{'*' if learned else ' '} {id:>5}  {text}{chr(27) + '[0m' if color else ''}")
        if number == count:
            return


if __name__ == "__main__":
    run(main)
