"""What make_optimizer tells each parameter: its rate, its decay, its betas; and clipping."""
from types import SimpleNamespace

import pytest
import torch

from minillm.optimizer import make_optimizer, parameters_by_role
from support.tiny_models import tiny_model

KINDS = ["muon", "adamw"]


def optimizer_of(model, kind, frozen=(), **changes):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    settings = dict(optimizer=kind, learning_rate=0.03, beta1=0.6, beta2=0.8, weight_decay=0.1,
                    embedding_rate=2.0, vector_rate=0.5)
    optimizer = make_optimizer(model, SimpleNamespace(**settings | changes))
    optimizer.set_rate(0.03)
    return optimizer


def groups_of(optimizer):
    return {p: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_decay_and_vectors_never_do(kind):
    model = tiny_model(n_expert=4)

    groups = groups_of(optimizer_of(model, kind))

    for name, parameter in model.named_parameters():
        expected = 0.0 if parameter.dim() < 2 else 0.1
        assert groups[parameter]["weight_decay"] == expected, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (4,), (4, 1, 1), (1, 4, 1, 1), (1, 32), (2, 3, 3, 3)])
def test_what_is_no_matrix_is_trained_as_a_vector(kind, shape):
    """A scale per head, say, whatever shape makes it fit."""
    model = tiny_model()
    added = model.blocks[0].attn.scale = torch.nn.Parameter(torch.ones(shape))
    optimizer = optimizer_of(model, kind)
    added.grad = torch.ones(shape)

    optimizer.set_clipping(torch.tensor(1.0), 1.0)
    optimizer.step()

    assert groups_of(optimizer)[added]["weight_decay"] == 0.0
    rate = 0.03 if kind == "adamw" else 0.015
    torch.testing.assert_close(added.detach(), torch.full(shape, 1 - rate))


def test_a_qkv_matrix_with_more_rows_is_trained_as_one_matrix():
    """With a gate for each query head, say."""
    model = tiny_model()
    qkv = model.blocks[0].attn.qkv = torch.nn.Linear(32, 96)
    optimizer = optimizer_of(model, "muon")
    qkv.weight.grad = torch.ones(96, 32)
    before = qkv.weight.detach().clone()

    optimizer.set_clipping(torch.tensor(1.0), 1.0)
    optimizer.step()

    assert groups_of(optimizer)[qkv.weight]["split"] is None
    assert not torch.equal(qkv.weight, before)


def test_beside_muon_the_router_has_the_rate_of_vectors():
    model = tiny_model(n_expert=4)

    groups = groups_of(optimizer_of(model, "muon"))

    routers = parameters_by_role(model)["routers"]
    assert [groups[p]["lr"] for p in routers] == [0.015] * 4


def test_with_adamw_alone_all_have_one_rate():
    groups = groups_of(optimizer_of(tiny_model(n_expert=4), "adamw"))

    assert {group["lr"] for group in groups.values()} == {0.03}


@pytest.mark.parametrize("kind", KINDS)
def test_the_betas_of_the_command_reach_adamw(kind):
    model = tiny_model()

    groups = groups_of(optimizer_of(model, kind))

    assert groups[model.wte.weight]["betas"] == (0.6, 0.8)


def test_queries_keys_and_values_are_parts_of_their_own():
    model = tiny_model(n_embd=32, n_head=4, n_kv_head=2)

    groups = groups_of(optimizer_of(model, "muon"))

    for block in model.blocks:
        assert groups[block.attn.qkv.weight]["split"] == (32, 16, 16)
        assert groups[block.attn.proj.weight]["split"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_are_left_out(kind):
    model = tiny_model()
    frozen = ("blocks.0.attn.qkv.weight", "blocks.0.ffn.up.weight", "norm.weight")

    groups = groups_of(optimizer_of(model, kind, frozen))

    assert {name for name, p in model.named_parameters() if p not in groups} == set(frozen)


def state_after(kind, norm, largest, on_host=False, scale=1.0):
    """(weights, moments) after two steps on gradients of that norm, times `scale`."""
    model = tiny_model()
    optimizer = optimizer_of(model, kind)
    optimizer.skips_on_host = on_host
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in model.parameters():
            p.grad = scale * torch.randn(p.shape, generator=generator)
        optimizer.set_clipping(torch.tensor(norm), largest)
        optimizer.step()
    return list(model.parameters()), optimizer.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm, largest", [(0.5, 1.0), (1.0, 1.0), (100.0, 0.0), (0.5, 0.0)])
def test_gradients_that_are_small_enough_stay_as_they_are(kind, norm, largest):
    """largest=0: they always are."""
    torch.testing.assert_close(state_after(kind, norm, largest), state_after(kind, 1.0, 9.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_host", [False, True])
def test_large_gradients_are_scaled_down_to_the_largest_norm(kind, on_host):
    clipped = state_after(kind, norm=8.0, largest=2.0, on_host=on_host)

    torch.testing.assert_close(clipped, state_after(kind, 1.0, 9.0, scale=0.25))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_16_bits_can_be_trained(kind):
    """As somebody may who lacks memory: their gradients' norm then has 16 bits, too."""
    model = tiny_model().bfloat16()
    optimizer = optimizer_of(model, kind)
    before = model.norm.weight.clone()

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.set_clipping(torch.tensor(4.0, dtype=torch.bfloat16), 1.0)
    optimizer.step()

    assert not torch.equal(model.norm.weight, before)
