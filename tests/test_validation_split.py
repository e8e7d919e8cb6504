"""The validation split: a property of the content, and about the share that was asked for."""
import random
from typing import NamedTuple

import pytest

from minillm.documents import Document, columns
from minillm.shuffle import content_digest
from minillm.split import ValidationSplit
from support import processes, training_runs
from support.preparation_runs import chats, read_documents, texts, write_chats


def validation(corpus, out, *flags, **options):
    """The texts that are for validation."""
    corpus.pretrain(out, *flags, **options)
    return {corpus.tokenizer.decode(ids) for ids in read_documents(out, "val")}


def test_split_stays_when_files_are_added(small_corpus, tmp_path):
    """Whatever the order of the files and the seed."""
    alone = validation(small_corpus, tmp_path / "1", files=["a.jsonl"])

    both = validation(small_corpus, tmp_path / "2", "--seed=5", files=["b.jsonl", "a.jsonl"])

    assert alone and alone == both & set(texts(120))


def test_a_larger_share_holds_the_smaller_one(small_corpus, tmp_path):
    smaller = validation(small_corpus, tmp_path / "1")

    larger = validation(small_corpus, tmp_path / "2", fraction=0.3)

    # 60 expected, standard deviation 6.5
    assert smaller < larger and 40 < len(larger) < 80


class Sizes(NamedTuple):
    name: str
    sizes: list                      # bytes of each document


SIZES = [
    Sizes("many", [100] * 100_000),
    Sizes("one huge among many", [100] * 2000 + [10_000_000]),
    Sizes("few", [1000] * 5),
    Sizes("one huge among few", [10, 10, 10_000]),
    Sizes("one huge before many", [10_000_000] + [100] * 2000),
]


def documents_of(sizes):
    documents = []
    for number, size in enumerate(sizes):
        documents.append(Document(content_digest(str(number).encode()), size, b"", ""))
    return documents


def decided(documents):
    split = ValidationSplit(0.01, may_cut=True)
    some = len(documents) // 10 + 1
    for start in range(0, len(documents), some):
        split.count(columns(documents[start: start + some]))
    split.decide()
    return split


def hash_of(document):
    return int.from_bytes(document.digest[:8], "little")


def share_for_validation(documents):
    split, all_documents = decided(documents), columns(documents)
    chosen = int(all_documents.sizes[split.in_validation(all_documents)].sum())
    chosen += sum(split.to_cut(all_documents).values())
    return chosen / sum(document.size for document in documents)


@pytest.mark.parametrize("case", SIZES, ids=[case.name for case in SIZES])
def test_share_of_bytes_is_within_a_factor_of_two(case):
    assert 0.005 <= share_for_validation(documents_of(case.sizes)) <= 0.02


def test_a_huge_document_is_not_for_validation_though_its_hash_is_low():
    documents = documents_of([100] * 2000)
    lowest = documents.index(min(documents, key=hash_of))
    documents[lowest] = documents[lowest]._replace(size=10_000_000)

    assert 0.005 <= share_for_validation(documents) <= 0.02


def test_of_many_documents_the_hash_alone_decides():
    documents = documents_of(SIZES[0].sizes)

    split = decided(documents)

    expected = [hash_of(document) < 0.01 * 2**64 for document in documents]
    assert split.in_validation(columns(documents)).tolist() == expected
    assert split.to_cut(columns(documents)) == {}


@pytest.mark.parametrize("n_below, expected", [(60, 60), (30, 50)])
def test_half_of_the_share_is_enough_for_the_hash_to_decide_alone(n_below, expected):
    """100 documents of 10,000 are asked for. What falls short of 50 is filled up to 50."""
    below, above = [], []
    for document in documents_of([100] * 12_000):
        (below if hash_of(document) < 0.01 * 2**64 else above).append(document)
    documents = [*below[:n_below], *above][:10_000]

    split = decided(documents)

    assert sum(split.in_validation(columns(documents))) == expected


def test_copies_of_a_document_count_with_it():
    """They go to validation together, so their bytes make the share together."""
    documents = [document for document in documents_of([100] * 50) for _ in range(7)]

    assert 0.005 <= share_for_validation(documents) <= 0.02


@pytest.mark.parametrize("sizes", [[100], [1_000_000, *[1] * 200]], ids=["alone", "the largest"])
def test_each_copy_of_a_document_that_is_cut_gives_the_same_share(sizes):
    documents = documents_of(sizes)
    documents = [documents[0]] * 40 + documents[1:]

    assert set(decided(documents).to_cut(columns(documents))) == set(range(40))
    assert share_for_validation(documents) == pytest.approx(0.01)


@pytest.mark.parametrize("seed", range(20))
def test_documents_of_very_different_sizes_give_about_the_share(seed):
    draw = random.Random(seed)
    sizes = [int(10 ** draw.uniform(1, 4)) for _ in range(draw.randrange(10, 1000))]

    assert 0.005 <= share_for_validation(documents_of(sizes)) <= 0.02


def test_a_cut_makes_the_share_what_was_asked_for():
    """Beside the whole document, of the lowest hash, that is in it already."""
    documents = sorted(documents_of([1000] * 3), key=hash_of)
    documents[0] = documents[0]._replace(size=3)

    assert share_for_validation(documents) == pytest.approx(0.01)


def test_where_the_lowest_are_too_small_the_largest_document_is_cut():
    documents = sorted(documents_of([1] * 200), key=hash_of)[::-1]
    documents[0] = documents[0]._replace(size=1_000_000)

    assert list(decided(documents).to_cut(columns(documents))) == [0]
    assert share_for_validation(documents) == pytest.approx(0.01)


def test_of_a_few_documents_that_may_not_be_cut_the_lowest_goes():
    documents = documents_of([100] * 5)
    split, all_documents = ValidationSplit(0.01, may_cut=False), columns(documents)
    split.count(all_documents)
    split.decide()

    [index] = split.in_validation(all_documents).nonzero()[0]

    assert documents[index] == min(documents, key=hash_of)


def test_few_conversations_give_one_to_validation(small_corpus, tmp_path):
    """The same one whatever the order."""
    few = write_chats(tmp_path / "few.jsonl", chats(5))
    turned = write_chats(tmp_path / "turned.jsonl", chats(5)[::-1])

    for out, file in (("1", few), ("2", turned)):
        _, made = small_corpus.sft(tmp_path / out, files=[file], fraction=1e-4, block_size=1000)
        assert made["splits"]["train"]["documents"] == 4
        assert made["splits"]["val"]["documents"] == 1

    assert (tmp_path / "1" / "val.bin").read_bytes() == (tmp_path / "2" / "val.bin").read_bytes()


def test_no_conversation_is_for_validation_if_none_was_asked_for(small_corpus, tmp_path):
    few = write_chats(tmp_path / "few.jsonl", chats(5))

    _, made = small_corpus.sft(tmp_path / "s", files=[few], fraction=0, block_size=1000)

    assert made["splits"]["train"]["documents"] == 5 and made["splits"]["val"]["documents"] == 0


@pytest.mark.parametrize("fraction", [0.01, 0.05])
@pytest.mark.parametrize("line_end", ["", "\n"], ids=["one line", "many lines"])
def test_a_book_gives_its_end_to_validation(small_corpus, tmp_path, fraction, line_end):
    """40 KB, cut at a line end, or at a sentence end where there is none. Nothing is lost."""
    book = "".join(f"第{number}句，天地玄黄。{line_end}" for number in range(1400))
    (tmp_path / "book.txt").write_text(book)

    _, made = small_corpus.pretrain(tmp_path / "p", files=[tmp_path / "book.txt"],
                                    fraction=fraction)

    train, val = made["splits"]["train"]["bytes"], made["splits"]["val"]["bytes"]
    assert train + val == len(book.encode())
    assert fraction / 2 <= val / len(book.encode()) <= 2 * fraction
    parts = {}
    for split in ("train", "val"):
        documents = read_documents(tmp_path / "p", split)
        parts[split] = [small_corpus.tokenizer.decode(ids) for ids in documents]
    assert sorted("".join(parts["train"] + parts["val"])) == sorted(book)
    assert all(text in book and text.startswith("第") for text in parts["val"])


@pytest.mark.parametrize("text", ["a", "𪚥"], ids=["a token", "a character of several tokens"])
def test_a_text_that_cannot_be_cut_stays_whole(small_corpus, tmp_path, text):
    (tmp_path / "one.txt").write_text(text)

    small_corpus.pretrain(tmp_path / "p", files=[tmp_path / "one.txt"], fraction=0.005)

    documents = read_documents(tmp_path / "p", "train") + read_documents(tmp_path / "p", "val")
    assert [small_corpus.tokenizer.decode(ids) for ids in documents] == [text]


def test_a_checkpoint_from_before_the_run_moved_is_named(tmp_path):
    """Its validation data are those of the new folder, which it never saw."""
    old = training_runs.make_data(tmp_path / "old")
    new = training_runs.make_data(tmp_path / "new", train=5000)
    argv = [*training_runs.SHORT, f"--out_dir={tmp_path}/out"]
    training_runs.finish([*argv, f"--data_dir={old}", "--max_iters=5"])
    training_runs.finish([*argv, f"--data_dir={new}", "--max_iters=10", "--init_from=resume",
                          "--allow_other_data"])

    argv = [f"--out_dir={tmp_path}/out", "--device=cpu"]
    before = processes.finish("eval", [*argv, "--checkpoint=5"])
    after = processes.finish("eval", [*argv, "--checkpoint=10"])

    assert f"{new} is not what step 5 was trained on" in before
    assert "trained on" not in after
