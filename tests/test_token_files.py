"""Token files: pinned bytes, the same for any threads and batches; every document once, counted."""
import os
import resource

import pytest

from minillm import token_files
from support.preparation_runs import command, fingerprint, finish, read_documents, texts

# Change these only if the format of the token files is meant to change: every prepared corpus is
# then another one.
PINNED_PRETRAIN = {"train.bin": "89da9438ecc954de", "val.bin": "1eec58c3195b8bba"}
PINNED_SFT = {
    "train.bin": "e4f93fc33842992b",
    "train_mask.bin": "ab549271ebb96b16",
    "val.bin": "35a2a969635dc892",
    "val_mask.bin": "4a36d604a4bc7af2",
}
FILES = {"prepare_pretrain": ["a.jsonl", "b.jsonl"], "prepare_sft": ["chats.jsonl"]}


def pins(folder):
    prints = fingerprint(folder)
    del prints["meta.json"]
    return {name: value[:16] for name, value in prints.items()}


def test_bytes_of_pretraining_are_pinned(small_corpus, tmp_path):
    small_corpus.pretrain(tmp_path / "p")
    assert pins(tmp_path / "p") == PINNED_PRETRAIN


def test_bytes_of_sft_are_pinned(small_corpus, tmp_path):
    small_corpus.sft(tmp_path / "s", "--long=truncate")
    assert pins(tmp_path / "s") == PINNED_SFT


@pytest.mark.parametrize("stage", FILES)
def test_same_bytes_for_any_threads_and_batches(small_corpus, tmp_path, stage):
    found = []
    for threads, batch in [(1, 1_000_000), (2, 1_000_000), (2, 500), (1, 1)]:
        out = tmp_path / f"{threads}-{batch}"
        argv = small_corpus.argv(out, FILES[stage], "--val_fraction=0.1", f"--batch_size={batch}")
        command(stage, *argv, env={"RAYON_NUM_THREADS": str(threads)})
        found.append(fingerprint(out))

    assert len(found[0]) > 2 and found[0] == found[1] == found[2] == found[3]


def test_every_document_once_and_counted(small_corpus, tmp_path):
    tokenizer = small_corpus.tokenizer

    output, made = small_corpus.pretrain(tmp_path / "p")

    everything = []
    for split, counts in made["splits"].items():
        documents = read_documents(tmp_path / "p", split)
        assert counts["documents"] == len(documents)
        assert counts["tokens"] == sum(len(ids) + 1 for ids in documents)
        assert counts["bytes"] == sum(len(tokenizer.decode(ids).encode()) for ids in documents)
        assert f"{len(documents):,} documents, {counts['tokens']:,} tokens" in output
        everything += documents
    assert sorted(made["splits"]) == ["train", "val"]
    assert sorted(everything) == sorted(tokenizer.encode(text) for text in texts(200))
    assert sorted(map(tokenizer.decode, everything)) == sorted(texts(200))
    assert made["kind"] == "pretrain"
    assert made["vocab_size"] == tokenizer.vocab_size
    assert made["tokenizer_hash"] == tokenizer.hash
    assert made["skipped"] == {} and made["repaired"] == {}


@pytest.mark.parametrize("stage", FILES)
def test_other_tokens_with_the_same_counts_are_other_data(small_corpus, tmp_path, stage):
    """Training is told by this mark that a folder was prepared again, and refuses to resume."""
    name = FILES[stage][0]
    lines = (small_corpus.folder / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join(reversed(lines)) + "\n")
    found = []
    for source in (small_corpus.folder / name, small_corpus.folder / name, tmp_path / name):
        out = tmp_path / str(len(found))
        finish(stage, *small_corpus.argv(out, [source], "--val_fraction=0"))
        found.append(token_files.read_meta(out))

    first, again, other = map(token_files.fingerprint, found)
    assert first == again != other
    assert found[0]["splits"]["train"]["tokens"] == found[2]["splits"]["train"]["tokens"]


def test_few_files_may_be_open(small_corpus, tmp_path):
    """Here 45 more than the child inherits; on macOS a process begins with a limit of 256."""
    def limit():
        inherited = max(map(int, os.listdir("/dev/fd")))
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (inherited + 45, hard))
    finish("prepare_pretrain", *small_corpus.argv(tmp_path / "o", ["a.jsonl"]), before=limit)

    assert len(read_documents(tmp_path / "o", "train")) > 100
