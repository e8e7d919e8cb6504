"""The validation loss of training and the scores of eval.py, on losses that are known."""
import copy
import json
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minillm.attention import document_mask
from minillm.dataloader import TokenData
from minillm.device import autocast
from minillm.errors import UserError
from minillm.validation import bits_per_byte, check_counts, score, validation_loss
from support import processes
from support.exports import lively_model
from support.tiny_models import write_folder
from support.training_runs import BLOCK, make_data

CPU = torch.device("cpu")
GO_ON = SimpleNamespace(asked=False)


@pytest.fixture(scope="module")
def val_data(tmp_path_factory):
    """SFT rows: 21 windows, of which each has its own number of supervised tokens."""
    folder = make_data(tmp_path_factory.mktemp("scores") / "data", "sft")
    return TokenData(folder, "val", BLOCK)


def watched(batches):
    """A forward pass whose loss is twice the sum of the supervised ids; it keeps the batches."""
    def forward(x, y):
        batches.append((x, y))
        return 2 * y[y >= 0].sum().float().requires_grad_(), None
    return forward


def targets_of(batches):
    return torch.cat([y[y >= 0] for _, y in batches])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_loss_is_the_mean_over_all_supervised_tokens(val_data, batch_size):
    """Every window once, also where the last batch is not full; all batches have one shape."""
    batches, s = [], SimpleNamespace(eval_iters=1000, batch_size=batch_size, seed=5)

    loss = validation_loss(watched(batches), val_data, s, CPU, rank=0, world=1, stop=GO_ON)

    _, y = val_data.windows(range(val_data.n_windows))
    assert sorted(targets_of(batches).tolist()) == sorted(y[y >= 0].tolist())
    assert loss == pytest.approx(2 * y[y >= 0].double().mean().item())
    assert {len(x) for x, _ in batches} == {batch_size}


def test_the_windows_are_the_same_for_every_seed(val_data):
    chosen = []
    for seed in (1, 2):
        s = SimpleNamespace(eval_iters=2, batch_size=3, seed=seed)
        validation_loss(watched(chosen), val_data, s, CPU, rank=0, world=1, stop=GO_ON)

    assert len(chosen) == 4 and all(len(x) == 3 for x, _ in chosen)
    assert torch.equal(chosen[0][0], chosen[2][0]) and torch.equal(chosen[1][0], chosen[3][0])


def test_no_batch_keeps_the_activations_of_the_one_before(val_data):
    """Where the caller keeps gradients on, a whole validation would not fit into memory."""
    alive, held = [], []

    def forward(x, y):
        alive.append(sum(reference() is not None for reference in held))
        activations = y.float().requires_grad_().exp()
        held.append(weakref.ref(activations))
        return (activations * activations).sum(), None
    s = SimpleNamespace(eval_iters=4, batch_size=3, seed=1)

    validation_loss(forward, val_data, s, CPU, 0, 1, GO_ON)

    assert alive == [0, 0, 0, 0]


def test_a_validation_that_is_cut_short_has_no_loss(val_data):
    batches, s = [], SimpleNamespace(eval_iters=2, batch_size=3, seed=1)

    loss = validation_loss(watched(batches), val_data, s, CPU, 0, 1, SimpleNamespace(asked=True))

    assert loss is None and batches == []


def test_windows_without_a_supervised_token_have_no_loss(val_data):
    """The loss would be 0, and the best for ever."""
    data = copy.copy(val_data)
    data.loss_mask = np.zeros_like(val_data.loss_mask)
    data.loss_mask[-1] = 1                       # so the split does hold one, in its last window
    s = SimpleNamespace(eval_iters=1, batch_size=3)

    with pytest.raises(UserError, match="hold no supervised token: raise --eval_iters"):
        validation_loss(watched([]), data, s, CPU, 0, 1, GO_ON)
    with pytest.raises(UserError, match="hold no supervised token: raise --eval_iters"):
        score(lively_model(block_size=BLOCK), data, False, 3, 1, CPU, torch.float32)


@pytest.mark.parametrize("batches, batch_size", [(0, 4), (0, 1000), (3, 4)])
@pytest.mark.parametrize("doc_mask", [False, True])
@torch.no_grad()
def test_scores_are_those_of_the_windows_one_by_one(val_data, batches, batch_size, doc_mask):
    model = lively_model(n_expert=4, block_size=BLOCK)
    count = min(val_data.n_windows, batches * batch_size or val_data.n_windows)
    losses, hits, loads = [], [], []
    for window in range(count):
        x, y = val_data.windows([window])
        hidden, (_, load) = model.hidden(x, document_mask(x) if doc_mask else None)
        logits = model.logits(hidden)
        supervised = y[0] >= 0
        logs = logits[0].log_softmax(-1)[supervised].gather(1, y[0][supervised][:, None])
        losses += (-logs[:, 0]).tolist()
        hits += (logits[0].argmax(-1) == y[0])[supervised].tolist()
        loads.append(load)

    result = score(model, val_data, doc_mask, batch_size, batches, CPU, torch.float32)

    assert result["tokens"] == len(losses)
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result["accuracy"] == pytest.approx(sum(hits) / len(hits))
    torch.testing.assert_close(torch.tensor(result["load"]), torch.stack(loads).mean(0))


@torch.no_grad()
def test_logits_in_bfloat16_are_scored_in_float32(val_data):
    model = lively_model(block_size=BLOCK)
    x, y = val_data.windows(range(val_data.n_windows))
    with autocast(CPU, torch.bfloat16):
        logits = model(x)[y >= 0]
    expected = F.cross_entropy(logits.double(), y[y >= 0]).item()

    result = score(model, val_data, False, val_data.n_windows, 0, CPU, torch.bfloat16)

    assert logits.dtype == torch.bfloat16
    assert result["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_mask_between_documents_changes_the_score(val_data):
    model = lively_model(block_size=BLOCK)

    masked, whole = (score(model, val_data, mask, 8, 0, CPU, torch.float32)["loss"]
                     for mask in (True, False))

    assert masked != whole


@pytest.mark.parametrize("scale, loss", [(math.nan, "nan"), (1e36, "inf")])
def test_weights_that_are_not_finite_are_said_so(val_data, scale, loss):
    """Also those whose logits are finite, and the loss is not."""
    model = lively_model(block_size=BLOCK)
    model.norm.weight.data *= scale

    with pytest.raises(UserError, match=f"the loss on .* is {loss}: the model's weights"):
        score(model, val_data, False, 8, 0, CPU, torch.float32)


def test_scoring_keeps_no_activations(val_data, monkeypatch):
    model, kept = lively_model(block_size=BLOCK).requires_grad_(), []
    inner = model.logits

    def recorded(x):
        kept.append(inner(x).requires_grad)
        return inner(x)
    monkeypatch.setattr(model, "logits", recorded)

    with torch.enable_grad():
        score(model, val_data, False, 8, 1, CPU, torch.float32)

    assert kept == [False]


COUNTS = {"tokens": 100, "bytes": 400, "learned_tokens": 30, "learned_bytes": 60}


@pytest.mark.parametrize("kind, bytes_per_token", [("pretrain", 4), ("sft", 2)])
def test_bits_per_byte_are_of_what_is_supervised(kind, bytes_per_token):
    meta = {"kind": kind, "splits": {"val": COUNTS}}

    assert bits_per_byte(math.log(2) * 8, meta) == pytest.approx(8 / bytes_per_token)


@pytest.mark.parametrize("count", [None, 0, "many", 1.5])
def test_counts_that_make_no_bits_per_byte_are_refused(count):
    check_counts({"kind": "sft", "splits": {"val": COUNTS}})

    with pytest.raises(UserError, match="does not count 'learned_bytes': prepare the data again"):
        check_counts({"kind": "sft", "splits": {"val": COUNTS | {"learned_bytes": count}}})


def test_a_model_that_is_very_wrong_has_a_score(val_data, tmp_path):
    """exp of its loss is more than a float holds."""
    model = lively_model(block_size=BLOCK)
    model.norm.weight.data *= 1e6
    write_folder(tmp_path, model)

    processes.finish("eval", [f"--out_dir={tmp_path}", f"--data_dir={val_data.folder}",
                              "--questions=none", "--device=cpu"])

    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["loss"] > 1000 and math.isfinite(result["perplexity"])
