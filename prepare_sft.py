"""Prepare conversations for supervised fine-tuning (SFT): token files with a loss mask.

    python prepare_sft.py data/raw/chats.json --tokenizer=data/tokenizer --out_dir=data/sft
    python prepare_sft.py                            # the embedded demo conversations
    python prepare_sft.py chats.json --show=3        # print three as tokens, and write nothing

Reads .jsonl, .json and .ndjson (one record per line, an array, or records one after the other) and
.parquet, and folders of them; all but .parquet also as .gz, .bz2, .xz, .zst or in a tar. A record
is one of these (minillm/chat_names.py has all names; --map adds more):

- turns: a list of them, or one under conversations, messages, conversation, dialogue, chat, turns.
  A turn has a role (key from, role or speaker) and a text (key value, content or text). Roles, in
  any case: user, human, prompter, 用户; assistant, gpt, bot, model, ai, chatgpt, 助手; system,
  developer.
- a pair: instruction (and input), prompt, question or query; and output, response, completion,
  answer or target; with the turns before it under history. TRL's prompt and completion may both be
  lists of turns; those of the prompt are context then, and not learned.
- UltraChat's: texts under data, without roles: question, answer, question, answer …

The system prompt can also stand beside them, under system or system_prompt. A turn with weight,
loss, train, trainable or loss_mask 0 or false is context: it is not learned. Beside the turns such
a flag may be a list, with an entry for each turn or for each answer.

Writes train.bin, val.bin (rows of block_size + 1 little-endian uint16), train_mask.bin,
val_mask.bin (uint8 of the same length: 1 on the supervised tokens, which are what the assistant
says and its <|im_end|>, see Tokenizer.loss_mask) and meta.json. Whole conversations are packed into
rows, best fit first. Each conversation ends with <|endoftext|>, which tells attention where the
next one begins; the padding is <|endoftext|> too. The bytes depend on the input, the tokenizer and
the seed alone.

Exit status: 0; 2 after a mistake that you can correct, with one line on stderr; 130 after Ctrl-C.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import itertools
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from tqdm import tqdm

from minillm.atomic_folder import replaced_folder
from minillm.chat_names import Names
from minillm.configurator import BelowOne, NonNegative, Positive, configure, positional, whole
from minillm.documents import Document, columns
from minillm.encode_ahead import default_processes, encode_ahead
from minillm.errors import UserError, run
from minillm.packing import COUNTS, RowWriter, to_payload
from minillm.report import Report
from minillm.shuffle import DiskShuffle, content_digest
from minillm.split import ValidationSplit
from minillm.text_files import Block, Source, batches_of
from minillm.text_reader import block_conversations
from minillm.token_files import check_splits, print_summary, write_meta
from minillm.tokenizer import IM_END, ROLES, Tokenizer, is_supervised, pack_ids

try:
    from minillm.speed.batch_tokenizer import BatchTokenizer
except ImportError:                              # minillm/speed was deleted
    BatchTokenizer = Tokenizer                   # the same ids, slower


@dataclass
class Settings:
    files: list[str] = positional()   # files or folders of conversations; none: the demo's
    tokenizer: str | None = None      # its folder; default data/tokenizer, or data/demo/tokenizer
    out_dir: str | None = None        # default data/sft, or data/demo/sft without FILE
    block_size: whole(8, 1 << 20) | None = None  # the model's block_size; auto: 512, demo 128
    long: Literal["split", "truncate"] = "split"  # a conversation that exceeds a row
    val_fraction: BelowOne = 0.01     # share for validation, chosen by a hash of each conversation
    seed: int = 1337                  # of the order of the conversations
    dedup: bool = False               # drop exact copies of a conversation
    map: str = ""                     # names of roles and keys in your files: q:user,a:assistant
    encoding: str = "utf-8"           # of the input, e.g. gb18030; a byte order mark overrides it
    strict: bool = False              # stop at the first line that would be skipped
    processes: whole(0, 1000) = 0     # how many encode; 0: one per core, or one for a small input
    batch_size: Positive = 1_000_000  # bytes encoded in one call: affects speed and memory only
    show: NonNegative = 0             # print this many conversations as tokens, and write nothing


FILES = {"train.bin", "val.bin", "train_mask.bin", "val_mask.bin", "meta.json"}
MAP_HINT = "; --map=KEY:user,KEY:assistant says which hold the question and the answer"
SHOWN = 60                           # tokens of a turn that --show prints at least


def main():
    s = configure(Settings)
    begun = time.perf_counter()
    where = "data" if s.files else "data/demo"
    s.tokenizer, s.out_dir = s.tokenizer or f"{where}/tokenizer", s.out_dir or f"{where}/sft"
    s.block_size = s.block_size or (512 if s.files else 128)
    tokenizer = BatchTokenizer.load(s.tokenizer)
    report = Report(s.strict, MAP_HINT, s.encoding)
    names = Names(s.map)
    source = Source(s.files, report, s.encoding) if s.files else None
    if source:
        source.leave_out_txt()
    blocks = source.blocks(s.batch_size) if source else demo_blocks()
    if s.show:
        show(tokenizer, blocks, names, report, s)
        return
    batches = batches_of(blocks, s.batch_size)
    capacity = s.block_size + 1
    encode = partial(encode_blocks, tokenizer, names, capacity, s.long, s.strict)
    size = source.size if source else 0
    processes = s.processes or default_processes(size)
    with replaced_folder(s.out_dir, FILES) as folder:
        # 1) read, encode, and put in buckets on the disk
        on_duplicate = partial(report.skip, "duplicate of an earlier conversation")
        shuffle = DiskShuffle(os.path.join(folder, "buckets"), s.seed, s.dedup, on_duplicate)
        split = ValidationSplit(s.val_fraction, may_cut=False)
        # by bytes of the input, or by conversations of the demo; no bar without a terminal
        with tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            for documents, block_report in encode_ahead(encode, batches, processes):
                report.merge(block_report)
                shuffle.add(documents)
                split.count(documents)
                bar.update(source.position - bar.n if source else len(documents.sizes))
        # 2) read the buckets, pack, and write the files
        split.decide()
        splits = write_splits(folder, shuffle, split, capacity)
        check_splits(splits, s.val_fraction, report)
        keys = ("tokenizer", "block_size", "seed", "val_fraction", "dedup", "long")
        settings = {key: getattr(s, key) for key in keys}
        sources = s.files or ["demo.town.conversations()"]
        write_meta(folder, "sft", tokenizer, settings, splits, sources, report)
    print_summary(s.out_dir, splits, report)
    total = {key: splits["train"][key] + splits["val"][key] for key in COUNTS}
    padding = total["padding_tokens"] / total["tokens"]
    supervised = total["learned_tokens"] / total["tokens"]
    seconds = time.perf_counter() - begun
    print(f"  padding {padding:.2%} of tokens, supervised {supervised:.2%}, {seconds:.1f} s")


def demo_blocks():
    from demo.town import conversations                  # only the demo needs the town
    records = [(f"demo:{number}", record) for number, record in enumerate(conversations(), 1)]
    yield Block("records", "demo", 1, records)


def encode_blocks(tokenizer, names, capacity, long, strict, blocks):
    """Blocks → (Documents, Report of what was skipped or repaired)."""
    report, chats = Report(strict), []
    for block in blocks:
        chats += block_conversations(block, report, names)
    documents = encode_conversations(tokenizer, chats, capacity, long, report)
    return columns(documents), report


def encode_conversations(tokenizer, chats, capacity, long, report):
    """[(place, messages)] → [Document] of at most `capacity` tokens, with their <|endoftext|>.

    The payload is the number of supervised bytes, the tokens, and their mask.
    """
    # A character takes at least one byte, so a content with more characters than a row of longest
    # tokens has bytes fits into no row: one of 50 MB need not be encoded to find that out
    most_characters = capacity * max(map(len, tokenizer.token_bytes))
    contents = [message["content"] for _, messages in chats for message in messages]
    short = [text for text in contents if len(text) <= most_characters]
    encoded = iter(tokenizer.encode_packed(short))
    prefixes = {role: pack_ids(tokenizer.prefix(role)) for role in ROLES}
    suffix = pack_ids(tokenizer.suffix)
    documents = []
    for place, messages in chats:
        turns = []
        for message in messages:
            if len(message["content"]) <= most_characters:
                ids = next(encoded)
                tokens = prefixes[message["role"]] + ids + suffix
                mask = tokenizer.loss_mask(message, len(ids) // 2)       # ids: two bytes each
                turns.append(EncodedTurn(message, tokens, mask, len(mask)))
            else:
                turns.append(EncodedTurn(message, b"", b"", capacity))
        parts = fit(turns, capacity, long, report, place)
        digest = conversation_digest(messages)
        for number, part in enumerate(parts):
            if number:
                # bytes 0-7 decide the split, so they stay: all parts go to the same split. Bytes
                # 8-15 tell documents apart (DiskShuffle), so they change
                other = content_digest(digest + number.to_bytes(4, "little"))
                digest = digest[:8] + other[8:]
            documents.append(to_document(part, digest, place))
    return documents


class EncodedTurn(NamedTuple):
    """A message as tokens: prefix, content and suffix."""
    message: dict
    tokens: bytes                        # uint16
    mask: bytes                          # 1 on the supervised tokens
    length: int                          # in tokens; a row's, if the turn fits into no row


def fit(turns, capacity, long, report, place):
    """Cut the turns of a conversation into parts that fit into rows; each is a list of turns.

    A part begins with the system turn and holds whole exchanges (a question and its answer). With
    long="truncate" there is one part at most.
    """
    if sum(turn.length for turn in turns) < capacity:    # <, because an <|endoftext|> follows
        return [turns]
    system = [turn for turn in turns if turn.message["role"] == "system"]
    # after the system turn, user and assistant alternate: clean_conversation() makes it so
    exchanges = [turns[start: start + 2] for start in range(len(system), len(turns), 2)]
    base = sum(turn.length for turn in system)
    parts, part, length, lost = [], [], base, False
    for exchange in exchanges:
        size = sum(turn.length for turn in exchange)
        if length + size < capacity:
            part += exchange
            length += size
            continue
        if long == "truncate":
            lost = True
            break
        if part:
            parts.append(system + part)
        part, length = [], base
        if base + size < capacity:
            part, length = list(exchange), base + size
        else:
            report.skip("exchange longer than a row", place)
    if part:
        parts.append(system + part)
    if lost and not parts:
        report.skip("too long for a row, with its first answer", place)
    elif lost:
        report.repair("later turns cut off to fit a row", place)
    if len(parts) > 1:
        report.repair("long conversation continued as another one", place)
    return [part for part in parts if any(is_supervised(turn.message) for turn in part)]


def conversation_digest(messages):
    parts = []
    for message in messages:
        mark = "" if message.get("supervised", True) else "\x1f"
        parts.append(f"{message['role']}\x1f{message['content']}{mark}")
    return content_digest("\x1e".join(parts).encode("utf-8"))


def to_document(turns, digest, place):
    """The Document of a part (a list of turns)."""
    size, supervised_bytes = 0, 0
    for turn in turns:
        content = len(turn.message["content"].encode("utf-8"))
        size += content
        if is_supervised(turn.message):
            supervised_bytes += content
    tokens, masks = [turn.tokens for turn in turns], [turn.mask for turn in turns]
    return Document(digest, size, to_payload(tokens, masks, supervised_bytes), place)


def write_splits(folder, shuffle, split, capacity):
    """Empty the shuffle into the rows of train and val; returns their counts for meta.json."""
    train, val = RowWriter(folder, "train", capacity), RowWriter(folder, "val", capacity)
    for documents in shuffle.shuffled():
        in_validation = split.in_validation(documents)
        val.add(documents.chosen(in_validation))
        train.add(documents.chosen(~in_validation))
    train.close()
    val.close()
    return {"train": train.counts, "val": val.counts}


def show(tokenizer, blocks, names, report, s):
    """Print s.show conversations token by token; raises UserError if none was understood."""
    chats = itertools.chain.from_iterable(
        block_conversations(block, report, names) for block in blocks)
    number = 0
    for number, (place, messages) in enumerate(itertools.islice(chats, s.show), 1):
        show_conversation(tokenizer, place, messages)
    if not number:
        reasons = report.in_a_line() or "the input is empty"
        raise UserError(f"no conversation was understood ({reasons})")
    for line in report.lines():
        print(line)


def show_conversation(tokenizer, place, messages):
    """Print the tokens of a conversation: supervised ones green, control tokens blue."""
    total = tokenizer.encode_chat(messages)
    print(f"--- {place}: {len(total[0])} tokens, {sum(total[1])} supervised (*)")
    for message in messages:
        pairs = list(zip(*tokenizer.encode_chat([message])))
        if len(pairs) <= 2 * SHOWN:
            show_tokens(tokenizer, pairs)
        else:
            show_tokens(tokenizer, pairs[: SHOWN // 2])
            print(f"          … {len(pairs) - SHOWN:,} tokens …")
            show_tokens(tokenizer, pairs[-(SHOWN // 2):])


def show_tokens(tokenizer, pairs):
    color = sys.stdout.isatty()
    for token, supervised in pairs:
        mark = "*" if supervised else " "
        line = f"{mark} {token:>5}  {tokenizer.token_text(token)}"
        if color and supervised:
            line = f"\033[32m{line}\033[0m"
        elif color and token <= IM_END:
            line = f"\033[34m{line}\033[0m"
        print(f"  {line}")


if __name__ == "__main__":
    run(main)
