"""Embeddings of tokens that earlier training never saw are drawn anew, and nothing else."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minillm.init import redraw_collapsed_rows
from minillm.tokenizer import IM_START
from support.tiny_models import tiny_model

NEVER_IN_TEXT = list(range(40, 53))               # as many as bytes that UTF-8 doesn't use
COLLAPSED = [IM_START, 2, 5, 9, 11, *NEVER_IN_TEXT]


def collapsed_model():
    model = tiny_model()
    row = torch.linspace(-1, 1, model.config.n_embd)
    for token in COLLAPSED:
        model.wte.weight.data[token] = row * 0.01 + 1e-6 * token
    return model


def test_only_collapsed_rows_of_the_coming_data_are_redrawn():
    model = collapsed_model()
    before = model.wte.weight.detach().clone()
    data = SimpleNamespace(tokens=np.array([0, 1, 2, 5, 7, 7, 1], np.uint16))

    count = redraw_collapsed_rows(model, data, seed=3)

    changed = (model.wte.weight != before).any(1).nonzero()[:, 0].tolist()
    assert (count, changed) == (3, [1, 2, 5])
    new = model.wte.weight[[1, 2, 5]]
    assert F.cosine_similarity(new[0], new[1], dim=0) < 0.9
    others = [token for token in range(len(before)) if token not in COLLAPSED]
    ratio = new.square().mean().sqrt() / before[others].square().mean().sqrt()
    assert 0.7 < ratio < 1.4


def test_the_same_seed_draws_the_same_rows():
    data = SimpleNamespace(tokens=np.array(COLLAPSED, np.uint16))
    models = [collapsed_model() for _ in range(3)]

    for model, seed in zip(models, (1, 1, 2)):
        redraw_collapsed_rows(model, data, seed)

    first, again, other = (model.wte.weight for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_second_sft_finds_the_rows_that_the_first_did_not_need():
    """The control tokens have been trained since; what no chat held is as collapsed as before."""
    model = collapsed_model()
    model.wte.weight.data[[IM_START, 2, 5]] = torch.randn(3, model.config.n_embd)
    before = model.wte.weight.detach().clone()
    data = SimpleNamespace(tokens=np.array([0, 1, 2, 5, 9, 11], np.uint16))

    assert redraw_collapsed_rows(model, data, seed=1) == 2
    changed = (model.wte.weight != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [9, 11]


@pytest.mark.parametrize("alike", [0, 12])
def test_rows_that_have_not_collapsed_stay(alike):
    """Nor have a few that are alike, fewer than the bytes that UTF-8 doesn't use: synonyms, say."""
    model = tiny_model()
    model.wte.weight.data[60: 60 + alike] = model.wte.weight[60].clone()
    before = model.wte.weight.detach().clone()
    data = SimpleNamespace(tokens=np.arange(100, dtype=np.uint16))

    assert redraw_collapsed_rows(model, data, seed=1) == 0
    assert torch.equal(model.wte.weight, before)


def test_rows_are_finite_where_all_have_collapsed():
    model = tiny_model()
    model.wte.weight.data[:] = 0.5
    data = SimpleNamespace(tokens=np.arange(100, dtype=np.uint16))

    assert redraw_collapsed_rows(model, data, seed=1) == 100

    assert 0.45 < model.wte.weight[:100].square().mean().sqrt() < 0.55


def test_new_rows_are_as_large_as_the_trained_ones_however_many_have_collapsed():
    model = tiny_model()
    model.wte.weight.data[10:290] = 1e-3
    trained = torch.cat((model.wte.weight[:10], model.wte.weight[290:]))
    data = SimpleNamespace(tokens=np.arange(10, 290, dtype=np.uint16))

    assert redraw_collapsed_rows(model, data, seed=1) == 280

    ratio = model.wte.weight[10:290].square().mean().sqrt() / trained.square().mean().sqrt()
    assert 0.9 < ratio < 1.1
