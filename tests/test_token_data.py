"""TokenData on a few tokens: its windows and targets, and the files that it refuses."""
import json
import os

import pytest

from minillm import dataloader
from minillm.dataloader import TokenData, batch_windows, rank_batches, show_windows
from minillm.errors import UserError
from support.tiny_tokenizer import VOCAB, tokenizer
from support.training_runs import make_data

BLOCK = 4


def pretraining(folder, tokens):
    return make_data(folder, tokens={"train": tokens, "val": tokens})


def sft(folder, tokens, mask):
    return make_data(folder, "sft", block_size=BLOCK, tokens={"train": tokens, "val": tokens},
                     mask={"train": mask, "val": mask})


@pytest.mark.parametrize("count, n_windows", [(8, 1), (9, 2), (12, 2), (13, 3)])
def test_a_window_needs_the_token_after_it(tmp_path, count, n_windows):
    tokens = list(range(10, 10 + count))
    data = TokenData(pretraining(tmp_path / "data", tokens), "train", BLOCK)

    x, y = data.windows(range(data.n_windows))

    assert data.n_windows == n_windows
    assert x.flatten().tolist() == tokens[: n_windows * BLOCK]
    assert y.flatten().tolist() == tokens[1: n_windows * BLOCK + 1]


TOKENS = [10, 11, 12, 13, 14, 20, 21, 22, 23, 24]
MASK = [0, 0, 1, 1, 0, 1, 0, 0, 0, 1]


def test_a_target_counts_where_the_mask_of_that_token_is_1(tmp_path):
    """The first token of a row is no target, whatever its mask says."""
    data = TokenData(sft(tmp_path / "data", TOKENS, MASK), "train", BLOCK)

    x, y = data.windows([1, 0])

    assert x.tolist() == [[20, 21, 22, 23], [10, 11, 12, 13]]
    assert y.tolist() == [[-1, -1, -1, 24], [-1, 12, 13, -1]]


def test_supervised_tokens_are_counted_of_this_rank_alone(tmp_path):
    data = TokenData(sft(tmp_path / "data", TOKENS, MASK), "train", BLOCK)

    shares = [rank_batches(data, seed=1, step=0, batch_size=1, micro_steps=2, rank=rank, world=2)
              for rank in range(2)]

    assert sorted(count for _, count in shares) == [1, 2]
    assert all((y >= 0).sum() == count for [(_, y)], count in shares)


def test_a_row_is_shown_with_its_supervised_tokens_marked(tmp_path, capsys):
    ids = tokenizer().encode("abcde")
    assert len(ids) == BLOCK + 1
    data = TokenData(sft(tmp_path / "data", ids, [0, 0, 1, 1, 0]), "train", BLOCK)

    show_windows(data, [0], tokenizer())

    assert capsys.readouterr().out == "--- window 0: 2 supervised tokens\nab⟦cd⟧e\n"


@pytest.mark.parametrize("n, windows", [
    (700, [360, 385, 609, 689, 562, 125]),
    (1024, [733, 768, 609, 689, 562, 125])])
def test_the_order_of_the_data_is_the_one_that_runs_were_begun_with(n, windows):
    """Another one would be as random, but a run that resumes would see some windows twice."""
    assert batch_windows(seed=1337, step=3, batch=6, n_windows=n).tolist() == windows


# ---- files that contradict each other

def change(path, data=None, cut=0, more=b""):
    content = path.read_bytes() if data is None else data
    path.write_bytes(content[: len(content) - cut] + more)


def tell(folder, **changes):
    """Let meta.json say something else of the training split."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"] |= changes
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGE = [
    (lambda folder: tell(folder, tokens=11), "holds 10 tokens, but .*meta.json says 11"),
    (lambda folder: tell(folder, tokens=9), "holds 10 tokens, but .*meta.json says 9"),
    (lambda folder: change(folder / "train.bin", more=b"\1"),
     "has 21 bytes, not a whole number of 2-byte tokens"),
    (lambda folder: change(folder / "train_mask.bin", cut=1), "has 9 entries for 10 tokens"),
    (lambda folder: change(folder / "train_mask.bin", more=b"\1"), "has 11 entries for 10 tokens"),
    (lambda folder: change(folder / "train_mask.bin", bytes(9) + b"\2"), "other values than 0"),
    (lambda folder: change(folder / "train_mask.bin", bytes(10)), "marks no token as supervised"),
]


@pytest.mark.parametrize("damage, says", DAMAGE, ids=[says for _, says in DAMAGE])
def test_files_that_do_not_belong_together_are_refused(tmp_path, damage, says):
    sft(tmp_path / "data", TOKENS, MASK)
    damage(tmp_path / "data")

    with pytest.raises(UserError, match=says):
        TokenData(str(tmp_path / "data"), "train", BLOCK)


def test_rows_that_are_not_whole_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds 9 tokens, not whole rows of 5"):
        TokenData(sft(tmp_path / "data", TOKENS[:9], MASK[:9]), "train", BLOCK)


@pytest.mark.parametrize("token, fits", [(VOCAB - 1, True), (VOCAB, False)])
@pytest.mark.parametrize("at", [0, 7, 12])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path, monkeypatch, token, fits,
                                                              at):
    """In whichever part of the file it is."""
    monkeypatch.setattr(dataloader, "CHUNK", 5)
    tokens = [10] * 13
    tokens[at] = token
    folder = pretraining(tmp_path / "data", tokens)

    if fits:
        assert TokenData(folder, "train", BLOCK).n_windows == 3
    else:
        with pytest.raises(UserError, match=f"token {at} is {VOCAB}, outside the vocabulary"):
            TokenData(folder, "train", BLOCK)


def test_a_bad_id_in_a_part_that_was_not_checked_is_found_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, "CHUNK", 1)
    monkeypatch.setattr(dataloader, "CHECKED_AT_START", 1)
    data = TokenData(pretraining(tmp_path / "data", [10] * 6 + [999] * 4), "train", BLOCK)

    assert data.windows([0])[0].tolist() == [[10] * BLOCK]
    with pytest.raises(UserError, match="token 6 is 999, outside the vocabulary"):
        data.windows([1])


def test_supervised_tokens_may_come_late_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, "CHUNK", 5)

    data = TokenData(sft(tmp_path / "data", TOKENS, [0] * 9 + [1]), "train", BLOCK)

    assert data.windows([1])[1].tolist() == [[-1, -1, -1, 24]]


def test_a_mask_is_checked_in_all_parts_of_a_short_file(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, "CHUNK", 5)
    folder = sft(tmp_path / "data", TOKENS, [0] * 4 + [1] + [2] * 5)

    with pytest.raises(UserError, match="other values than 0 and 1"):
        TokenData(folder, "train", BLOCK)
