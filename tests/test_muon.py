"""Muon against a plain reference in float64; rates, clipping, skipped steps, loading."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch.fx.experimental.proxy_tensor import make_fx

from minillm.errors import UserError
from minillm.muon import FIRST_HALF, SECOND_HALF, orthogonalise
from minillm.init import init_for_muon
from minillm.optimizer import make_optimizer, parameters_by_role
from model import GPT, GPTConfig
from support.muon_matrices import SPLIT, all_of, matrices, muon_of, set_gradients
from support.tiny_models import tiny_model

SPECTRA = {"falling": torch.logspace(0, -2, 64), "all equal": torch.ones(64),
           "one large": torch.tensor([1.0] + [0.01] * 63),
           "rank 1": torch.tensor([1.0] + [0.0] * 63)}


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_come_near_one_in_bfloat16(shape, spectrum):
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    s = SPECTRA[spectrum].double()

    values = torch.linalg.svdvals(orthogonalise((u * s @ v * 1e-6).bfloat16()).double())

    assert values.max() < 1.45
    assert values[:, : int((s > 0).sum())].min() > 0.2


def half(s, a, pairs):
    """What a half of orthogonalise makes of singular values s."""
    gram = s**2
    for b, c in pairs:
        gram = b * gram + c * gram**2
    return s * (a + gram)


def spread(s, *coefficients):
    """The largest value over the smallest that become of singular values s, (n,)."""
    values = half(s, *coefficients)
    return (values.max() / values.min()).item() if values.min() > 0 else float("inf")


# each half with the singular values it is made for: a little beyond 1, which rounding can reach
MADE_FOR = [(FIRST_HALF, 0.001, 1.02), (SECOND_HALF, 0.0268, 1.1)]


@pytest.mark.parametrize("coefficients, low, high", MADE_FOR)
def test_no_other_coefficients_bring_the_singular_values_closer(coefficients, low, high):
    a, pairs = coefficients
    s = torch.logspace(math.log10(low), math.log10(high), 20001, dtype=torch.float64)
    best = spread(s, a, pairs)

    for factor in (0.99, 1.01):
        assert spread(s, a * factor, pairs) > best
        for i, (b, c) in enumerate(pairs):
            for pair in ((b * factor, c), (b, c * factor)):
                assert spread(s, a, pairs[:i] + (pair,) + pairs[i + 1:]) > best


def test_singular_values_come_between_a_quarter_and_one_and_a_third():
    s = torch.logspace(math.log10(0.0012), 0, 20001, dtype=torch.float64)

    values = half(half(s, *FIRST_HALF), *SECOND_HALF)

    assert 0.238 < values.min() and values.max() < 1.37


class PlainMuon:
    """One matrix (out, in) as the papers write it, by its singular values."""

    def __init__(self, weight, lr, weight_decay):
        self.weight, self.lr, self.weight_decay = weight.clone(), lr, weight_decay
        self.momentum = torch.zeros_like(weight)
        self.neuron = torch.zeros(len(weight), dtype=weight.dtype)

    def step(self, grad):
        self.momentum = 0.9 * self.momentum + 0.1 * grad
        left, s, right = torch.linalg.svd(0.1 * grad + 0.9 * self.momentum, full_matrices=False)
        s = s / s.square().sum().sqrt()
        s = half(half(s, *FIRST_HALF), *SECOND_HALF)
        o = left @ torch.diag(s) @ right
        self.neuron = 0.95 * self.neuron + 0.05 * o.square().mean(1)
        even = o / self.neuron.sqrt()[:, None]
        even = even * o.norm() / even.norm()
        rows, columns = o.shape
        length = self.lr * max(1, rows / columns) ** 0.5
        self.weight = self.weight * (1 - self.lr * self.weight_decay) - length * even


def plain_parts(name, weight):
    """The matrices (out, in) that a parameter consists of."""
    if name == "qkv":
        return list(weight.split(SPLIT))
    if name == "experts":
        return [expert.t() for expert in weight]
    return [weight]


def test_what_is_compiled_has_no_diagonal():
    """Of which torch 2.13 warns several times at the start of a run, when it is compiled."""
    graph = make_fx(orthogonalise)(torch.randn(1, 4, 8))

    assert "bmm" in graph.code and "diagonal" not in graph.code


@pytest.mark.parametrize("name", ["qkv", "up", "down", "experts"])
def test_matrices_move_as_the_plain_reference_moves_them(name):
    p = matrices()
    plain = [[PlainMuon(part, 0.03, 0.3) for part in plain_parts(name, x.detach())]
             for x in p[name]]
    muon = muon_of(p)

    for step in range(4):
        set_gradients(all_of(p), step)
        for x, parts in zip(p[name], plain):
            for part, grad in zip(parts, plain_parts(name, x.grad)):
                part.step(grad)
        muon.step()

    for x, parts in zip(p[name], plain):
        for ours, part in zip(plain_parts(name, x.detach()), parts):
            torch.testing.assert_close(ours, part.weight, rtol=1e-8, atol=1e-9)


def settings(**changes):
    values = dict(optimizer="muon", learning_rate=0.03, beta1=0.9, beta2=0.95, weight_decay=0.1,
                  embedding_rate=2.0, vector_rate=0.5)
    return SimpleNamespace(**values | changes)


def whole_optimizer(model, **changes):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(model, settings(**changes))
    optimizer.set_rate(0.03)
    return optimizer


def step_with(optimizer, parameters, step, norm=1.0, clip=1.0):
    set_gradients(parameters, step)
    optimizer.set_clipping(torch.tensor(norm), clip)
    optimizer.step()


@pytest.mark.parametrize("n_expert", [0, 4])
def test_every_parameter_has_one_role_and_its_rate(n_expert):
    model = tiny_model(n_expert=n_expert)
    optimizer = whole_optimizer(model)

    roles = parameters_by_role(model)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert set(rates) == set(model.parameters())
    assert len([p for group in roles.values() for p in group]) == len(rates)
    assert rates[model.wte.weight] == 0.06 and rates[model.norm.weight] == 0.015
    assert all(rates[p] == 0.03 for p in roles["matrices"] + roles["qkv"])
    assert len(roles["matrices"]) == 2 * 3 and len(roles["routers"]) == (4 if n_expert else 0)


def test_a_matrix_outside_the_blocks_is_trained_like_the_embedding():
    """Muon would move an output layer that somebody adds like a layer in between."""
    model = tiny_model()
    model.head = torch.nn.Linear(model.config.n_embd, model.config.vocab_size, bias=False)

    optimizer = whole_optimizer(model)

    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert groups[model.head.weight] is groups[model.wte.weight]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_clipping_equals_smaller_gradients(kind):
    a, b = tiny_model(), tiny_model()
    clipped, plain = whole_optimizer(a, optimizer=kind), whole_optimizer(b, optimizer=kind)

    for step in range(3):
        step_with(plain, list(b.parameters()), step)
        set_gradients(list(a.parameters()), step)
        for parameter in a.parameters():
            parameter.grad.mul_(4)
        clipped.set_clipping(torch.tensor(4.0), 1.0)
        clipped.step()

    torch.testing.assert_close(list(a.parameters()), list(b.parameters()))
    # directions have no length: of what Muon divides, the momenta alone show it
    torch.testing.assert_close(clipped.state_dict(), plain.state_dict())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("skips_on_host", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("before", [0, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(kind, skips_on_host, bad, before):
    model = tiny_model()
    parameters = list(model.parameters())
    optimizer = whole_optimizer(model, optimizer=kind)
    optimizer.skips_on_host = skips_on_host
    for step in range(before):
        step_with(optimizer, parameters, step)
    weights, state = copy.deepcopy(parameters), copy.deepcopy(optimizer.state_dict())

    set_gradients(parameters, 99)
    for parameter in parameters:
        parameter.grad.view(-1)[3] = bad
    optimizer.set_clipping(torch.tensor(bad), 1.0)
    optimizer.step()

    assert all(torch.equal(x, y) for x, y in zip(parameters, weights))
    for name, moments in optimizer.state_dict().items():
        for key, value in moments.items():
            old = state[name][key] if before else torch.zeros_like(value)
            assert torch.equal(value, old), (name, key)


def test_a_state_that_does_not_fit_is_refused_by_name():
    model = tiny_model()
    optimizer = whole_optimizer(model)
    step_with(optimizer, list(model.parameters()), 0)
    saved = optimizer.state_dict()
    saved["blocks.1.attn.qkv.weight"]["neuron"] = torch.zeros(3, 1)

    with pytest.raises(UserError, match="neuron of blocks.1.attn.qkv.weight"):
        optimizer.load_state_dict(saved)
    with pytest.raises(UserError, match="optimizer=muon, these settings say adamw"):
        whole_optimizer(model, optimizer="adamw").load_state_dict(optimizer.state_dict())


def test_a_fresh_model_starts_with_the_same_logits():
    """The embedding starts 25 times larger, the last norm smaller; the logits keep their spread.

    All but that of the token itself, which is larger: the embedding outweighs what the blocks add.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=1024, vocab_size=300))
    idx = torch.arange(64)[None]
    before = model(idx)[..., 64:].std()

    init_for_muon(model)

    assert model.wte.weight.std().item() == pytest.approx(0.5, rel=0.01)
    for name in ("attn.qkv", "attn.proj", "ffn.up", "ffn.down"):
        rows = model.blocks[0].get_parameter(name + ".weight").norm(dim=1)
        assert rows.square().mean().item() == pytest.approx(1, abs=1e-4), name
    assert model.norm.weight.unique().item() == pytest.approx(0.04)
    assert model(idx)[..., 64:].std().item() == pytest.approx(before.item(), rel=0.1)


def test_a_start_of_ones_own_is_scaled_and_not_drawn_anew():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=64, vocab_size=300))
    block = model.blocks[0]
    torch.nn.init.zeros_(block.ffn.down.weight)
    up = block.ffn.up.weight.detach().clone()

    init_for_muon(model)

    assert not block.ffn.down.weight.any()
    torch.testing.assert_close(block.ffn.up.weight / block.ffn.up.weight.norm(), up / up.norm())


def test_parameters_that_a_layer_draws_itself_start_as_they_are():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=64, vocab_size=300))
    added = nn.ParameterDict({"gain": torch.ones(2, 32), "adapter": 0.01 * torch.randn(4, 64)})
    before = {name: p.detach().clone() for name, p in added.items()}
    model.blocks[0].added = added

    init_for_muon(model)

    for name, p in added.items():
        assert torch.equal(p, before[name]), name


def test_without_a_weight_of_the_last_norm_the_embedding_starts_as_drawn(capsys):
    """Larger, it would make the logits so, and the first loss many times ln(vocab_size)."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=64, vocab_size=300))
    model.norm = nn.RMSNorm(64, elementwise_affine=False)
    before = model.wte.weight.detach().clone()

    init_for_muon(model)

    assert torch.equal(model.wte.weight, before)
    assert "the last norm has no weight" in capsys.readouterr().out


def test_the_matrices_of_an_moe_model_start_as_they_are():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=64, vocab_size=300, n_expert=2,
                          n_expert_per_tok=1))
    before = {name: p.detach().clone() for name, p in model.blocks.named_parameters()}

    init_for_muon(model)

    for name, p in model.blocks.named_parameters():
        assert torch.equal(p, before[name]), name
