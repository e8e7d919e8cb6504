"""Token files: the bytes, the boundaries, the counts, the split, the mask, the rows."""
import os
import random
import re
import resource

import numpy as np
import pytest

import prepare_sft
from minillm import packing, shuffle
from minillm.packing import pack
from minillm.report import Report
from minillm.shuffle import DiskShuffle, Document, content_digest
from minillm.split import ValidationSplit
from minillm.tokenizer import Tokenizer
from support.preparation_runs import (chats, command, fingerprint, finish, meta, read_documents,
                                      read_rows, refused, texts, write_chats, write_lines, write_texts)
from support.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, 200 documents in two files, 120 conversations."""
    folder = tmp_path_factory.mktemp("corpus")
    make_tokenizer(folder / "tokenizer")
    write_texts(folder / "a.jsonl", texts(120))
    write_texts(folder / "b.jsonl", texts(80, 120))
    write_chats(folder / "chats.jsonl", chats(120))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder / "tokenizer")


def pretrain(folder, out, *argv, files=("a.jsonl", "b.jsonl"), fraction=0.1):
    output = finish("prepare_pretrain", *(folder / name for name in files), f"--tokenizer={folder}/tokenizer", f"--out_dir={out}",
                    f"--val_fraction={fraction}", *argv)
    return output, meta(out)


def sft(folder, out, *argv, files=("chats.jsonl",), block_size=255, fraction=0.1):
    output = finish("prepare_sft", *(folder / name for name in files), f"--tokenizer={folder}/tokenizer", f"--out_dir={out}",
                    f"--val_fraction={fraction}", f"--block_size={block_size}", *argv)
    return output, meta(out)


# Change these only if the format of the token files is meant to change: every prepared corpus is
# then another one.
PINNED_PRETRAIN = {"train.bin": "89da9438ecc954de", "val.bin": "1eec58c3195b8bba"}
PINNED_SFT = {"train.bin": "e4f93fc33842992b", "train_mask.bin": "ab549271ebb96b16", "val.bin": "35a2a969635dc892", "val_mask.bin": "4a36d604a4bc7af2"}


def test_bytes_are_pinned(folder, tmp_path):
    pretrain(folder, tmp_path / "p")
    sft(folder, tmp_path / "s", "--long=truncate")
    for out, pinned in (("p", PINNED_PRETRAIN), ("s", PINNED_SFT)):
        found = {name: value[:16] for name, value in fingerprint(tmp_path / out).items() if name != "meta.json"}
        assert found == pinned


@pytest.mark.parametrize("stage, files", [("prepare_pretrain", ("a.jsonl", "b.jsonl")), ("prepare_sft", ("chats.jsonl",))])
def test_same_bytes_for_any_threads_and_batches(folder, tmp_path, stage, files):
    found = []
    for number, (threads, batch) in enumerate([(1, 1_000_000), (2, 1_000_000), (2, 500), (1, 1)]):
        out = tmp_path / str(number)
        command(stage, *(folder / name for name in files), f"--tokenizer={folder}/tokenizer", f"--out_dir={out}", "--val_fraction=0.1",
                f"--batch_size={batch}", env={"RAYON_NUM_THREADS": str(threads)})
        found.append(fingerprint(out))
    assert found[0] == found[1] == found[2] == found[3]


def test_every_document_once_and_counted(folder, tmp_path, tokenizer):
    output, made = pretrain(folder, tmp_path / "p")
    everything = []
    for split in ("train", "val"):
        documents = read_documents(tmp_path / "p", split)
        counts = made["splits"][split]
        assert counts["documents"] == len(documents)
        assert counts["tokens"] == sum(len(ids) + 1 for ids in documents)
        assert counts["bytes"] == sum(len(tokenizer.decode(ids).encode()) for ids in documents)
        assert f"{counts['documents']:,} documents, {counts['tokens']:,} tokens" in output
        everything += documents
    assert sorted(map(tokenizer.decode, everything)) == sorted(texts(200))
    assert sorted(everything) == sorted(tokenizer.encode(text) for text in texts(200))
    assert (made["kind"], made["vocab_size"], made["tokenizer_hash"]) == ("pretrain", tokenizer.vocab_size, tokenizer.hash)
    assert made["skipped"] == {} and made["repaired"] == {}


def test_documents_are_shuffled_by_the_seed(folder, tmp_path, tokenizer):
    orders = []
    for number, seed in enumerate((1, 1, 2)):
        pretrain(folder, tmp_path / str(number), f"--seed={seed}", fraction=0)
        orders.append([tokenizer.decode(ids) for ids in read_documents(tmp_path / str(number), "train")])
    assert orders[0] == orders[1] != orders[2]
    numbers = [texts(200).index(text) for text in orders[0]]
    assert sum(b == a + 1 for a, b in zip(numbers, numbers[1:])) < 8              # expected: 1
    assert abs(np.corrcoef(numbers, range(200))[0, 1]) < 0.25


def test_split_is_by_content(folder, tmp_path, tokenizer):
    """What is validation stays so when files are added, whatever the order, the seed or the format; about the share that was asked for."""
    def validation(out, *argv, **options):
        pretrain(folder, out, *argv, **options)
        return {tokenizer.decode(ids) for ids in read_documents(out, "val")}
    alone = validation(tmp_path / "1", files=("a.jsonl",))
    both = validation(tmp_path / "2", "--seed=5", files=("b.jsonl", "a.jsonl"))
    assert alone and alone == both & set(texts(120))
    larger = validation(tmp_path / "3", fraction=0.3)
    # 60 expected, standard deviation 6.5
    assert both < larger and 40 < len(larger) < 80


def documents_of(sizes):
    return [Document(content_digest(str(number).encode()), size, b"") for number, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [[100] * 100_000, [100] * 2000 + [10_000_000], [1000] * 5, [10, 10, 10_000]])
def test_split_fraction_over_many(sizes):
    """The share of bytes is within a factor of two of what was asked, for many documents, few, and huge ones."""
    documents = documents_of(sizes)
    split = ValidationSplit(0.01, may_cut=True)
    split.count(documents[: len(documents) // 2])
    split.count(documents[len(documents) // 2:])
    split.decide()
    chosen = sum(document.size for document in documents if split.in_validation(document))
    chosen += sum(split.bytes_to_cut(document) or 0 for document in documents)
    assert 0.005 * sum(sizes) <= chosen <= 0.02 * sum(sizes)
    if len(sizes) == 100_000:                            # by the hash alone
        assert all(split.in_validation(document) == (int.from_bytes(document.digest[:8], "little") < 0.01 * 2**64)
                   for document in documents)


def test_few_conversations_give_one_to_validation(folder, tmp_path):
    """The same one whatever the order; none if none was asked for."""
    write_chats(folder / "few.jsonl", chats(5))
    write_chats(folder / "few2.jsonl", chats(5)[::-1])
    bins = set()
    for out, file, fraction, val in [("1", "few.jsonl", 1e-4, 1), ("2", "few2.jsonl", 1e-4, 1), ("3", "few.jsonl", 0, 0)]:
        _, meta = sft(folder, tmp_path / out, files=(file,), fraction=fraction, block_size=1000)
        assert [meta["splits"][split]["documents"] for split in ("train", "val")] == [5 - val, val]
        bins.add((tmp_path / out / "val.bin").read_bytes() if val else b"")
    assert len(bins) == 2


@pytest.mark.parametrize("fraction", [0.01, 0.05])
@pytest.mark.parametrize("lines", [1, 400])
def test_a_book_gives_its_share_to_validation(folder, tmp_path, tokenizer, fraction, lines):
    """A text of 40 KB: its end, cut at a line, or at a sentence where there is no line.

    Nothing is lost.
    """
    book = "".join(f"第{number}句，天地玄黄。" + ("\n" if lines > 1 else "") for number in range(1400))
    (tmp_path / "book.txt").write_text(book)
    _, made = pretrain(tmp_path, tmp_path / "p", f"--tokenizer={folder}/tokenizer", files=("book.txt",), fraction=fraction)
    counts = made["splits"]
    share = counts["val"]["bytes"] / len(book.encode())
    assert fraction / 2 <= share <= 2 * fraction
    assert counts["train"]["bytes"] + counts["val"]["bytes"] == len(book.encode())
    end = tokenizer.decode(read_documents(tmp_path / "p", "val")[0])
    assert end in book and end.startswith("第")
    parts = [tokenizer.decode(ids) for split in ("train", "val") for ids in read_documents(tmp_path / "p", split)]
    assert sorted("".join(parts)) == sorted(book)


def test_duplicates(folder, tmp_path, tokenizer):
    items = texts(50)
    write_texts(folder / "c.jsonl", items + items[10:30] + items[10:12])
    _, kept = pretrain(folder, tmp_path / "1", files=("c.jsonl",))
    assert kept["splits"]["train"]["documents"] + kept["splits"]["val"]["documents"] == 72
    output, made = pretrain(folder, tmp_path / "2", "--dedup=True", files=("c.jsonl",))
    found = [tokenizer.decode(ids) for split in ("train", "val") for ids in read_documents(tmp_path / "2", split)]
    assert sorted(found) == sorted(items)
    (reason, entry), = made["skipped"].items()
    assert "duplicate" in reason and entry["count"] == 22 and "skipped 22: duplicate" in output
    # the first copy stays, the later ones go
    assert int(entry["first"].rsplit(":", 1)[1]) > 50
    write_chats(folder / "d.jsonl", chats(20) + chats(5))
    _, made = sft(folder, tmp_path / "3", "--dedup=True", files=("d.jsonl",), block_size=1000)
    assert made["splits"]["train"]["documents"] + made["splits"]["val"]["documents"] == 20
    assert [entry["count"] for entry in made["skipped"].values()] == [5]


@pytest.mark.parametrize("dedup", [False, True])
def test_shuffle_with_buckets_over_the_limit(tmp_path, monkeypatch, dedup):
    """A bucket too large for memory is split again, and the order stays what it was."""
    def shuffled(name):
        (tmp_path / name).mkdir()
        dropped = []
        disk_shuffle = DiskShuffle(str(tmp_path / name), 3, dedup, dropped.append)
        for i in range(2000):
            content = str(i % 1000).encode()
            disk_shuffle.add([Document(content_digest(content), len(content), content * 5, f"f:{i}")])
        result = [(document.digest, bytes(document.payload)) for document in disk_shuffle.shuffled()]
        assert not (tmp_path / name).exists()
        return result, len(dropped)
    usual = shuffled("a")
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 300)
    assert shuffled("b") == usual
    assert len(usual[0]) == (1000 if dedup else 2000) and usual[1] == (1000 if dedup else 0)


def expected_parts(tokenizer, messages, capacity, long):
    """By the contract, spelled out.

    [(ids, mask)] of the parts of a conversation without a system turn.
    """
    parts, exchanges = [], [messages[start: start + 2] for start in range(0, len(messages), 2)]
    while exchanges:
        # as many exchanges as fit, with one <|endoftext|>
        for count in range(len(exchanges), 0, -1):
            ids, mask = tokenizer.encode_chat(sum(exchanges[:count], []))
            if len(ids) + 1 <= capacity:
                parts.append((ids, mask))
                break
        exchanges = exchanges[count:]
        if long == "truncate":
            break
    return parts


@pytest.mark.parametrize("long", ["split", "truncate"])
@pytest.mark.parametrize("block_size", [60, 100, 255, 1000])
def test_rows_hold_whole_exchanges(folder, tmp_path, tokenizer, block_size, long):
    output, made = sft(folder, tmp_path / "s", f"--long={long}", block_size=block_size)
    expected = [expected_parts(tokenizer, messages, block_size + 1, long) for messages in chats(120)]
    found = []
    for split in ("train", "val"):
        rows = read_rows(tmp_path / "s", split, block_size + 1)
        conversations = [conversation for row, _ in rows for conversation in row]
        counts = made["splits"][split]
        assert counts["rows"] == len(rows) and counts["tokens"] == len(rows) * (block_size + 1)
        assert counts["documents"] == len(conversations)
        assert counts["padding_tokens"] == sum(padding for _, padding in rows)
        assert counts["learned_tokens"] == sum(sum(mask) for _, mask in conversations)
        found += conversations
    assert sorted(found) == sorted((ids, mask) for parts in expected for ids, mask in parts)
    repaired, skipped = made["repaired"], made["skipped"]
    if long == "split":
        lost = sum(len(messages) // 2 - sum(sum(ids.count(1) for ids, _ in parts) // 2 for parts in [parts])
                   for messages, parts in zip(chats(120), expected))
        continued = sum(len(parts) > 1 for parts in expected)
        assert sum(entry["count"] for entry in skipped.values()) == lost
        assert sum(entry["count"] for entry in repaired.values()) == continued
        assert set(skipped) <= {"exchange longer than a row"}
        assert block_size > 255 or continued > 5
    else:
        dropped = sum(not parts for parts in expected)
        truncated = sum(bool(parts) and parts[0][0].count(1) < len(messages)
                        for messages, parts in zip(chats(120), expected))
        assert sum(entry["count"] for entry in skipped.values()) == dropped
        assert sum(entry["count"] for entry in repaired.values()) == truncated
        if truncated:
            assert f"repaired {truncated}: later turns cut off to fit a row" in output


def test_parts_of_a_conversation_share_system_turn_and_split(folder, tmp_path, tokenizer):
    """Each part begins with the system turn; all of a conversation are on one side.

    Every answer is learned once.
    """
    conversations = [[{"role": "system", "content": f"善{number}"}] + messages
                     for number, messages in enumerate(chats(40))]
    write_chats(folder / "system.jsonl", conversations)
    sft(folder, tmp_path / "s", "--dedup=True", files=("system.jsonl",), block_size=300, fraction=0.3)
    sides, answers = {}, []
    for split in ("train", "val"):
        for row, _ in read_rows(tmp_path / "s", split, 301):
            for ids, mask in row:
                text = tokenizer.decode(ids, skip_special=False)
                head = re.match(r"<\|im_start\|>system\n(善\d+)<\|im_end\|>\n<\|im_start\|>user\n", text)
                sides.setdefault(head[1], set()).add(split)
                answers += re.findall(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", text, re.S)
    assert all(len(found) == 1 for found in sides.values()) and len(sides) == 40
    assert sorted(answers) == sorted(m["content"] for messages in chats(40) for m in messages[1::2])


def test_conversation_that_just_fits(folder, tmp_path, tokenizer):
    messages = [{"role": "user", "content": "的"}, {"role": "assistant", "content": "人" * 40}]
    length = len(tokenizer.encode_chat(messages)[0]) + 1
    write_chats(folder / "one.jsonl", [messages])
    _, made = sft(folder, tmp_path / "s", files=("one.jsonl",), block_size=length - 1, fraction=0)
    assert made["splits"]["train"]["rows"] == 1 and made["splits"]["train"]["padding_tokens"] == 0
    for long, reason in (("split", "exchange longer than a row"), ("truncate", "too long for a row")):
        line = refused("prepare_sft", folder / "one.jsonl", f"--tokenizer={folder}/tokenizer", f"--out_dir={tmp_path}/t",
                       "--val_fraction=0", f"--block_size={length - 2}", f"--long={long}")
        assert reason in line and not (tmp_path / "t").exists()


@pytest.mark.parametrize("long", ["split", "truncate"])
def test_conversation_far_too_long_is_not_encoded(tokenizer, monkeypatch, long):
    """The part that cannot fit is not even encoded, and what is kept is the same."""
    short = [{"role": "user", "content": "的"}, {"role": "assistant", "content": "人"}]
    endless = short + [{"role": "user", "content": "在" * 5000}, {"role": "assistant", "content": "是"}]
    seen = []
    encode_batch = Tokenizer.encode_batch

    def watched(self, texts):
        seen.extend(texts)
        return encode_batch(self, texts)
    monkeypatch.setattr(Tokenizer, "encode_batch", watched)
    report = Report()
    chats = [("x", endless), ("y", short)]

    first, second = prepare_sft.encode_conversations(tokenizer, chats, 64, long, report)

    assert first.payload == second.payload and first.digest != second.digest
    assert not any(len(text) > 1000 for text in seen)
    counted = report.skipped if long == "split" else report.repaired
    assert [entry["count"] for entry in counted.values()] == [1]


def test_turns_of_weight_0_are_not_supervised(folder, tmp_path, tokenizer):
    turns = [("user", "一", None), ("assistant", "不学", 0), ("user", "二", None), ("assistant", "要学", 1)]
    messages = [{"role": role, "content": content, "weight": weight} for role, content, weight in turns]
    write_lines(folder / "weight.jsonl", [{"messages": messages}])
    _, made = sft(folder, tmp_path / "s", files=("weight.jsonl",), fraction=0)
    (((ids, mask),), _), = read_rows(tmp_path / "s", "train", 256)
    learned = tokenizer.decode([id for id, m in zip(ids, mask) if m], skip_special=False)
    assert learned == "要学<|im_end|>" and "不学" in tokenizer.decode(ids)
    assert made["splits"]["train"]["learned_bytes"] == 6


def test_pools_are_packed_one_by_one(folder, tmp_path, tokenizer):
    def small_pools():
        packing.POOL_TOKENS = 500
    finish("prepare_sft", folder / "chats.jsonl", f"--tokenizer={folder}/tokenizer", f"--out_dir={tmp_path}/s", "--val_fraction=0",
           "--block_size=255", before=small_pools)
    found = [ids for row, _ in read_rows(tmp_path / "s", "train", 256) for ids, _ in row]
    assert sorted(found) == sorted(ids for messages in chats(120) for ids, _ in expected_parts(tokenizer, messages, 256, "split"))


def naive_best_fit_decreasing(lengths, capacity):
    """The number of rows, by the definition of the algorithm, in quadratic time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


def fewest_rows(lengths, capacity):
    """A number of rows below which no packing can go: L2 of Martello and Toth (1990)."""
    count = np.bincount(lengths, minlength=capacity + 1)
    items, tokens = np.append(0, count.cumsum()), np.append(0, (count * np.arange(capacity + 1)).cumsum())
    best = 0
    for small in range(capacity // 2 + 1):
        # nothing of `small` or more fits beside them
        alone = items[-1] - items[capacity - small + 1]
        # no two of them fit together
        half = items[capacity - small + 1] - items[capacity // 2 + 1]
        room = half * capacity - (tokens[capacity - small + 1] - tokens[capacity // 2 + 1])
        rest = tokens[capacity // 2 + 1] - tokens[small]
        best = max(best, int(alone + half + max(0, -(-(rest - room) // capacity))))
    return best


@pytest.mark.parametrize("capacity, shape", [(1, "any"), (7, "any"), (64, "any"), (64, "short"), (64, "long"), (513, "any"), (513, "short")])
def test_packing(capacity, shape):
    rng = random.Random(capacity)
    low, high = {"any": (1, capacity), "short": (1, max(1, capacity // 4)), "long": (capacity // 3, capacity)}[shape]
    for count in (0, 1, 2, 10, 400):
        lengths = [rng.randint(low, high) for _ in range(count)]
        rows = pack(lengths, capacity)
        assert sorted(item for row in rows for item in row) == list(range(count))
        assert all(sum(lengths[item] for item in row) <= capacity for row in rows)
        assert len(rows) == naive_best_fit_decreasing(lengths, capacity)
        assert fewest_rows(lengths, capacity) <= len(rows) <= 11 / 9 * fewest_rows(lengths, capacity) + 4


@pytest.mark.slow
def test_packing_ten_million_conversations(tmp_path):
    """RowWriter on simulated lengths.

    Ten times the conversations take the same memory.
    """
    capacity, peaks, padding = 513, [], []
    for name in ("train.bin", "train_mask.bin"):
        (tmp_path / name).symlink_to("/dev/null")
    for count in (1_000_000, 10_000_000):
        rng = np.random.default_rng(0)
        pool = bytes(3 * capacity)
        writer = packing.RowWriter(str(tmp_path), "train", capacity)
        for length in np.minimum(capacity, 20 + rng.lognormal(4.6, 0.8, count)).astype(int).tolist():
            writer.add(Document(b"", 1, packing._LEARNED.pack(1) + pool[:3 * length]))
        writer.close()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        padding.append(writer.counts["padding_tokens"] / writer.counts["tokens"])
        print(f"{count:,} conversations: peak {peaks[-1]:.0f} MiB, padding {padding[-1]:.3%}")
    # the list of lengths above takes 400 of it
    assert peaks[1] < peaks[0] + 700
    assert padding[1] < 0.03


def test_few_files_may_be_open(folder, tmp_path):
    """As on macOS, where a process begins with a limit of 256.

    Here 45 beyond what the child inherits.
    """
    def limit():
        inherited = max(map(int, os.listdir("/dev/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (inherited + 45, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    finish("prepare_pretrain", folder / "a.jsonl", f"--tokenizer={folder}/tokenizer", f"--out_dir={tmp_path}/o", before=limit)
    assert len(read_documents(tmp_path / "o", "train")) > 100


def test_show(folder, tmp_path):
    output = finish("prepare_sft", folder / "chats.jsonl", f"--tokenizer={folder}/tokenizer", f"--out_dir={tmp_path}/s", "--show=2")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    heads = [line for line in output.splitlines() if line.startswith("---")]
    lines = [line for line in output.splitlines() if not line.startswith("---")]
    pairs = [pair for messages in chats(2) for pair in zip(*tokenizer.encode_chat(messages))]
    assert len(heads) == 2 and len(lines) == len(pairs)
    assert all((int(line[3:9]), line[2] == "*") == (id, bool(mask)) for line, (id, mask) in zip(lines, pairs))
    assert not (tmp_path / "s").exists()


def test_nothing_is_written_for_what_cannot_be(folder, tmp_path):
    write_lines(tmp_path / "bad.jsonl", [{"text": "一"}, {"txt": "二"}])
    (tmp_path / "empty.jsonl").write_text("\n")
    common = f"--tokenizer={folder}/tokenizer", f"--out_dir={tmp_path}/o"
    cases = [
        ("prepare_pretrain", [tmp_path / "bad.jsonl", "--strict=True"], "bad.jsonl:2: no text under 'text'"),
        ("prepare_pretrain", [tmp_path / "empty.jsonl"], "no document"),
        ("prepare_pretrain", [tmp_path / "missing.jsonl"], "no such file"),
        ("prepare_pretrain", [folder / "a.jsonl", "--val_fraction=1.5"], "val_fraction"),
        ("prepare_pretrain", [folder / "a.jsonl", "--encoding=klingon"], "unknown encoding"),
        ("prepare_pretrain", [folder / "a.jsonl", "--encoding=cp037"], "cannot be cut into lines"),
        ("prepare_pretrain", [folder / "a.jsonl", "--tokenizer=nowhere"], "train_tokenizer.py"),
        ("prepare_sft", [folder / "a.jsonl"], "no conversation"),
        ("prepare_sft", [folder / "chats.jsonl", "--block_size=4"], "block_size"),
        ("prepare_sft", [folder / "chats.txt"], "no such file"),
    ]
    for stage, argv, word in cases:
        assert word in refused(stage, *common, *argv), (stage, argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "empty.jsonl"]


def test_benchmark_prints_both_ratios():
    output = command("bench.data", "--megabytes=1", "--repeats=1")
    for stage in ("prepare_pretrain.py", "prepare_sft.py"):
        block = output.split(stage)[1]
        bare, whole = (float(re.search(rf"{name} +([\d.]+) s +[\d.]+ MB/s +[\d,]+ tokens/s", block)[1]) for name in ("bare loop", "preparation"))
        ratio = float(re.search(r"ratio +([\d.]+)%", block)[1]) / 100
        assert bare > 0 and abs(ratio - bare / whole) < 0.05 + 0.01 / whole
        assert 20 < float(re.search(r"peak memory of the preparation ([\d,]+) MiB", block)[1].replace(",", "")) < 1024
