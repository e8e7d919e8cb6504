"""The shuffle of preparation: an order of the seed alone, duplicates dropped, bounded memory."""
import re

import numpy as np
import pytest

from minillm import shuffle
from minillm.documents import Document, columns
from minillm.shuffle import DiskShuffle, content_digest
from support.preparation_runs import chats, read_documents, texts, write_chats, write_texts


def test_documents_are_shuffled_by_the_seed(small_corpus, tmp_path):
    orders = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        small_corpus.pretrain(tmp_path / name, f"--seed={seed}", fraction=0)
        documents = read_documents(tmp_path / name, "train")
        orders.append([small_corpus.tokenizer.decode(ids) for ids in documents])

    assert orders[0] == orders[1] != orders[2]
    numbers = [texts(200).index(text) for text in orders[0]]
    neighbours = [pair for pair in zip(numbers, numbers[1:]) if pair[1] == pair[0] + 1]
    assert len(neighbours) < 8                           # expected: 1
    assert abs(np.corrcoef(numbers, range(200))[0, 1]) < 0.25


def test_copies_of_a_document_are_kept(small_corpus, tmp_path):
    copied = write_texts(tmp_path / "copied.jsonl", texts(50) + texts(22))

    _, made = small_corpus.pretrain(tmp_path / "p", files=[copied])

    assert sum(split["documents"] for split in made["splits"].values()) == 72


def test_dedup_keeps_the_first_copy_of_a_document(small_corpus, tmp_path):
    items = texts(50)
    copied = write_texts(tmp_path / "copied.jsonl", items + items[10:30] + items[10:12])

    output, made = small_corpus.pretrain(tmp_path / "p", "--dedup=True", files=[copied])

    found = []
    for split in ("train", "val"):
        documents = read_documents(tmp_path / "p", split)
        found += [small_corpus.tokenizer.decode(ids) for ids in documents]
    assert sorted(found) == sorted(items)
    [(reason, entry)] = made["skipped"].items()
    assert "duplicate" in reason and entry["count"] == 22 and "skipped 22: duplicate" in output
    _, first_line = entry["first"].rsplit(":", 1)
    assert int(first_line) > 50


def test_characters_per_token_do_not_depend_on_copies(small_corpus, tmp_path):
    """What is printed tells how well the tokenizer fits the text, whatever dedup drops of it."""
    once = write_texts(tmp_path / "once.jsonl", texts(50))
    thrice = write_texts(tmp_path / "thrice.jsonl", texts(50) * 3)

    plain, _ = small_corpus.pretrain(tmp_path / "plain", files=[once])
    deduplicated, _ = small_corpus.pretrain(tmp_path / "deduplicated", "--dedup", files=[thrice])

    ratio = r"[0-9.]+(?= characters per token)"
    assert re.findall(ratio, plain) == re.findall(ratio, deduplicated) != []


def test_dedup_of_conversations(small_corpus, tmp_path):
    copied = write_chats(tmp_path / "copied.jsonl", chats(20) + chats(5))

    _, made = small_corpus.sft(tmp_path / "s", "--dedup=True", files=[copied], block_size=1000)

    assert sum(split["documents"] for split in made["splits"].values()) == 20
    assert [entry["count"] for entry in made["skipped"].values()] == [5]


def shuffled(folder, dedup):
    """2,000 documents, each twice: ([(digest, payload)] as they come out, number of duplicates)."""
    dropped = []
    disk_shuffle = DiskShuffle(str(folder), 3, dedup, dropped.append)
    for i in range(2000):
        content = str(i % 1000).encode()
        document = Document(content_digest(content), len(content), content * 5, f"f:{i}")
        disk_shuffle.add(columns([document]))
    found = []
    for documents in disk_shuffle.shuffled():
        found += zip(documents.digests.tolist(), map(bytes, documents.payloads))
    assert not folder.exists()
    return found, len(dropped)


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("bound, value", [("BUCKET_BYTES", 300), ("PART", 3)])
def test_a_bucket_over_a_bound_is_cut_and_the_order_stays(tmp_path, monkeypatch, dedup, bound,
                                                          value):
    documents, dropped = shuffled(tmp_path / "usual", dedup)

    monkeypatch.setattr(shuffle, bound, value)

    assert shuffled(tmp_path / "cut", dedup) == (documents, dropped)
    assert len(documents) == (1000 if dedup else 2000)
    assert dropped == (1000 if dedup else 0)


def through(folder, documents, **options):
    """The payloads of Documents that go into a shuffle one by one, as they come out."""
    disk_shuffle = DiskShuffle(str(folder), 3, **options)
    for document in documents:
        disk_shuffle.add(columns([document]))
    return [bytes(payload) for part in disk_shuffle.shuffled() for payload in part.payloads]


def test_documents_that_come_one_by_one_are_shuffled_too(tmp_path):
    documents = [Document(bytes(16), 1, str(i).encode(), "") for i in range(1000)]

    numbers = list(map(int, through(tmp_path / "s", documents)))

    assert sorted(numbers) == list(range(1000))
    assert abs(np.corrcoef(numbers, range(1000))[0, 1]) < 0.15           # 0.03 is usual


def test_of_many_copies_the_first_that_arrived_stays(tmp_path):
    """Also where a file's name is not UTF-8: its place is reported as it is."""
    digests, dropped = [content_digest(str(i).encode()) for i in range(400)], []
    documents = [Document(digests[i % 400], 4, str(i).encode(), f"\udcff:{i}")
                 for i in range(10_000)]

    kept = through(tmp_path / "s", documents, dedup=True, on_duplicate=dropped.append)

    assert sorted(map(int, kept)) == list(range(400))
    assert sorted(dropped) == sorted(f"\udcff:{i}" for i in range(400, 10_000))


def test_half_a_digest_in_common_makes_no_copy(tmp_path):
    documents = [Document(half * 8 + b"12345678", 1, half, "") for half in (b"a", b"b")]

    kept = through(tmp_path / "s", documents, dedup=True)

    assert sorted(kept) == [b"a", b"b"]


def test_a_bucket_is_cut_until_its_documents_have_equal_keys(tmp_path, monkeypatch):
    """Copies of one document have one key, which no cut can part."""
    copies = [Document(content_digest(b"same"), 1, b"same", "f:1")] * 3
    other = Document(content_digest(b"other"), 1, b"other", "f:4")
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 1)
    dropped = []

    kept = through(tmp_path / "s", [*copies, other], dedup=True, on_duplicate=dropped.append)

    assert sorted(kept) == [b"other", b"same"] and len(dropped) == 2
