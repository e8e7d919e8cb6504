"""The mixture of experts.

Against a loop over tokens in float64, transformers' Mixtral routing, balance, gradients.
"""
import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig
from minillm.speed.grouped_mm import all_experts, grouped_experts, lay_out_for_decoding
from minillm.speed.topk import top_experts
from moe import MoE, balance_loss, loop_over_experts

CONFIG = dict(block_size=32, vocab_size=101, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48, n_expert=8, n_expert_per_tok=3)


def layer(experts=grouped_experts, **changes):
    torch.manual_seed(5)
    moe = MoE(GPTConfig(**CONFIG | changes))
    moe.experts = experts
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def by_token(moe, x, gate_TK, expert_TK):
    """Every token by itself: the plainest thing that is right."""
    rows = []
    for t, token in enumerate(x):
        y = 0
        for gate, e in zip(gate_TK[t], expert_TK[t].tolist()):
            y = y + gate * (F.silu(token @ moe.w1_EDF[e]) @ moe.w2_EFD[e])
        rows.append(y)
    return torch.stack(rows)


def uneven(moe, case):
    """Make the router prefer some experts: the loads of `case`."""
    with torch.no_grad():
        if case == "one takes most":
            moe.router.weight_DE[:, 0] *= 20
        # tokens are positive below, so these logits are far below the others
        elif case == "half are empty":
            moe.router.weight_DE[:, ::2] = -5.0


@pytest.mark.parametrize("case", ["even", "one takes most", "half are empty"])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("experts", [loop_over_experts, grouped_experts])
def test_equals_a_loop_over_tokens(experts, case, tokens):
    """Output and every gradient in float64, to 1e-9.

    Among the cases experts without a token, whose gradient is zero.
    """
    moe = layer(experts).double().eval()
    uneven(moe, case)
    x = torch.rand(1, tokens, 32, dtype=torch.float64)
    weight = torch.randn(1, tokens, 32, dtype=torch.float64)
    results = []
    for run in (lambda x: moe(x)[0], lambda x: by_token(moe, x[0], *moe.router(x[0]))[None]):
        x = x.detach().requires_grad_()
        moe.zero_grad()
        y = run(x)
        (y * weight).sum().backward()
        results.append([y, x.grad] + [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in moe.parameters()])
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, atol=1e-9, rtol=1e-9)
    if case == "half are empty":
        moe(x)[0].sum().backward()
        assert set(moe.router(x[0])[1].flatten().tolist()) <= {1, 3, 5, 7}
        assert moe.w1_EDF.grad[::2].eq(0).all() and moe.w2_EFD.grad[::2].eq(0).all()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("case", ["even", "one takes most", "half are empty"])
def test_grouped_product_is_near_float64(dtype, limit, case):
    """The kernel that training uses, in the types that training uses, with the same routing in float64 as its measure."""
    moe = layer().eval()
    uneven(moe, case)
    x = torch.rand(4, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = moe(x)[0]
    weight = torch.randn_like(x)
    (y * weight).sum().backward()
    exact = layer().double()
    exact.load_state_dict(moe.state_dict())
    gate_TK, expert_TK = (t.detach() for t in moe.router(x.flatten(0, 1)))
    expected = by_token(exact, x.flatten(0, 1).double(), gate_TK.double(), expert_TK).view_as(x)
    (expected * weight).sum().backward()
    pairs = [(y, expected), (moe.w1_EDF.grad, exact.w1_EDF.grad), (moe.w2_EFD.grad, exact.w2_EFD.grad)]
    for ours, reference in pairs:
        assert ours.isfinite().all() and (ours - reference).norm() < limit * reference.norm()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_twins_of_the_loop_agree_with_it(dtype, limit):
    """Sorted by expert, or all experts for all tokens.

    The weights as they lie and turned for decoding.
    """
    moe = layer().eval().to(dtype).requires_grad_(False)
    x = torch.randn(6, 32).to(dtype)
    routed = moe.router(x)
    plain = loop_over_experts(x, *routed, moe.w1_EDF, moe.w2_EFD)
    for _ in range(2):
        for twin in (grouped_experts, all_experts):
            y = twin(x, *routed, moe.w1_EDF, moe.w2_EFD)
            torch.testing.assert_close(y, plain, atol=limit, rtol=0.02)
        lay_out_for_decoding(moe)


def test_routes_as_mixtral_does():
    """With noise off, the gates of transformers' Mixtral on the same logits."""
    pytest.importorskip("transformers")
    from transformers import MixtralConfig
    from transformers.models.mixtral import modeling_mixtral
    moe = layer().eval()
    x = torch.randn(50, 32)
    router = modeling_mixtral.MixtralTopKRouter(MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=3))
    router.weight.data = moe.router.weight_DE.data.t().clone()
    gate_TK, expert_TK = moe.router(x)
    dense = torch.zeros(50, 8).scatter(1, expert_TK, gate_TK)
    _, theirs, their_experts = router(x)
    torch.testing.assert_close(dense, torch.zeros(50, 8).scatter(1, their_experts, theirs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("experts", [1, 2, 8, 60])
def test_top_experts_is_topk(experts):
    logits = torch.randn(200, experts)
    for k in {1, min(4, experts), experts}:
        assert torch.equal(top_experts(logits, k), logits.topk(k, dim=1)[1])


def test_parameter_counts():
    """876 M, of which 474 M are active, for config/moe_pretrain.py."""
    with torch.device("meta"):
        total, active = GPT(GPTConfig(n_expert=8, n_expert_per_tok=4)).n_params()
    assert abs(total / 876e6 - 1) < 0.01 and abs(active / 474e6 - 1) < 0.02


def test_noise_is_training_only_and_learned():
    """Evaluation is deterministic; in training the noise's spread is softplus(x · W_noise)."""
    moe = layer()
    x = torch.randn(3000, 32)
    moe.train()
    moe.router.weight_DE.data.zero_()
    moe.router.noise_DE.data.zero_()
    first, second = moe.router(x)[1], moe.router(x)[1]
    assert not torch.equal(first, second)
    # x is made positive: softplus(-large) is no noise at all
    moe.router.noise_DE.data.fill_(-100)
    assert torch.equal(moe.router(x.abs())[1], moe.router(x.abs())[1])
    moe.eval()
    moe.router.noise_DE.data.fill_(100)
    assert all(torch.equal(a, b) for a, b in zip(moe.router(x), moe.router(x)))


@pytest.mark.parametrize("experts_per_token", [1, 3])
def test_the_language_loss_alone_teaches_the_router(experts_per_token):
    """The router's weights and those of its noise both have a gradient, in every layer."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG | dict(n_expert_per_tok=experts_per_token))).train()
    idx = torch.randint(101, (4, 32))
    loss, _ = model(idx, idx.roll(-1, 1))
    loss.backward()
    for block in model.blocks:
        assert block.ffn.router.weight_DE.grad.norm() > 1e-6 and block.ffn.router.noise_DE.grad.norm() > 1e-6


def test_router_computes_in_float32_under_autocast():
    moe = layer().eval()
    x = torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        gate, expert = moe.router(x)
    assert gate.dtype == torch.float32 and torch.equal(gate, moe.router(x)[0])


def test_one_expert_per_token_is_scaled_by_its_probability():
    """Its gate is that of a softmax over all experts.

    The balance loss still is 0 where all is even.
    """
    moe = layer(n_expert_per_tok=1).eval()
    x = torch.randn(50, 32)
    gate, expert = moe.router(x)
    p = (x @ moe.router.weight_DE).softmax(1)
    torch.testing.assert_close(gate, p.max(1, keepdim=True)[0])
    assert torch.equal(expert, p.argmax(1, keepdim=True))
    even = balance_loss(torch.full((4, 1), 0.4), torch.arange(4)[:, None], 4)
    assert even.abs() < 1e-6


def test_balance_loss():
    """KL(uniform ‖ mean gate).

    0 when even, its formula otherwise, finite for an expert that nobody chose.
    """
    expert_TK = torch.tensor([[0, 1], [2, 3]])
    even = torch.full((2, 2), 0.5)
    assert balance_loss(even, expert_TK, 4).abs() < 1e-6
    gate_TK = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    mean = torch.tensor([0.45, 0.05, 0.3, 0.2])
    expected = sum(0.25 * math.log(0.25 / m) for m in mean.tolist())
    torch.testing.assert_close(balance_loss(gate_TK, expert_TK, 4), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    gate = gate_TK.clone().requires_grad_()
    loss = balance_loss(gate, expert_TK, 8)
    loss.backward()
    assert loss.isfinite() and loss > 1 and gate.grad.isfinite().all()


def test_shares_add_up():
    """What is logged of the load.

    Each layer's shares sum to 1, and count the rows that each expert got.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG)).eval()
    idx = torch.randint(101, (4, 32))
    _, (balance, share) = model(idx, idx)
    assert share.shape == (2, 8) and torch.allclose(share.sum(1), torch.ones(2)) and balance >= 0


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(dtype, fast):
    """fullgraph=True in training, and the same loss and gradients as without a compiler (noise off)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG | dict(n_layer=1))).train()
    if fast:
        model.use_fast(compiled=True)
    for block in model.blocks:
        block.ffn.router.eval()
    idx = torch.randint(101, (4, 32))
    losses, grads = [], []
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, (balance, _) = run(idx, idx.roll(-1, 1))
        (loss + balance).backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert abs(losses[0] / losses[1] - 1) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert (grads[0] - grads[1]).norm() < (1e-4 if dtype == torch.float32 else 0.1) * grads[0].norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["even", "one takes most", "half are empty"])
def test_on_a_gpu_it_is_near_float64(case):
    """bfloat16 on the GPU within its rounding of the float64 loop, with uneven loads and empty experts."""
    moe = layer(n_embd=64, n_inner=128).eval()
    uneven(moe, case)
    x = torch.rand(4, 32, 64)
    exact = layer(n_embd=64, n_inner=128).double()
    exact.load_state_dict(moe.state_dict())
    moe.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        y = moe(x.cuda())[0].cpu()
    gate_TK, expert_TK = (t.detach().cpu() for t in moe.router(x.flatten(0, 1).cuda()))
    expected = by_token(exact, x.flatten(0, 1).double(), gate_TK.double(), expert_TK).view_as(x)
    assert (y - expected).norm() < 0.02 * expected.norm()
