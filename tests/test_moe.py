"""MoE against a loop over tokens in float64 and Mixtral's routing; balance and gradients."""
import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig
from minillm.speed.grouped_mm import all_experts, grouped_experts, lay_out_for_decoding
from minillm.speed.topk import top_experts
from moe import MoE, balance_loss, loop_over_experts

CONFIG = dict(block_size=32, vocab_size=101, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
              n_inner=48, n_expert=8, n_expert_per_tok=3)
LOADS = ["even", "one takes most", "half are empty"]


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
        for gate, expert in zip(gate_TK[t], expert_TK[t].tolist()):
            hidden = F.silu(token @ moe.w1_EDF[expert])
            y = y + gate * (hidden @ moe.w2_EFD[expert])
        rows.append(y)
    return torch.stack(rows)


def uneven(moe, load):
    """Make the router prefer some experts, as `load` says."""
    with torch.no_grad():
        if load == "one takes most":
            moe.router.weight_DE[:, 0] *= 20
        elif load == "half are empty":
            # tokens are positive below, so these logits are far below the others
            moe.router.weight_DE[:, ::2] = -5.0


def output_and_gradients(moe, run, x, weight):
    """[y, the gradients of x and of each parameter] of the loss (y * weight).sum()."""
    x = x.detach().requires_grad_()
    moe.zero_grad()
    y = run(x)
    (y * weight).sum().backward()
    gradients = []
    for parameter in moe.parameters():
        none = torch.zeros_like(parameter)
        gradients.append(none if parameter.grad is None else parameter.grad.clone())
    return [y, x.grad, *gradients]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("experts", [loop_over_experts, grouped_experts])
def test_equals_a_loop_over_tokens(experts, load, tokens):
    """Output and every gradient in float64, to 1e-9."""
    moe = layer(experts).double().eval()
    uneven(moe, load)
    x = torch.rand(1, tokens, 32, dtype=torch.float64)
    weight = torch.randn(1, tokens, 32, dtype=torch.float64)

    def loop(x):
        return by_token(moe, x[0], *moe.router(x[0]))[None]
    ours = output_and_gradients(moe, lambda x: moe(x)[0], x, weight)
    expected = output_and_gradients(moe, loop, x, weight)

    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("experts", [loop_over_experts, grouped_experts])
def test_experts_without_a_token_have_a_gradient_of_zero(experts):
    moe = layer(experts).double().eval()
    uneven(moe, "half are empty")
    x = torch.rand(1, 40, 32, dtype=torch.float64)

    moe(x)[0].sum().backward()

    assert set(moe.router(x[0])[1].flatten().tolist()) <= {1, 3, 5, 7}
    assert moe.w1_EDF.grad[::2].eq(0).all() and moe.w2_EFD.grad[::2].eq(0).all()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("load", LOADS)
def test_grouped_product_is_near_float64(dtype, limit, load):
    """The kernel and the types of training; the referee takes the same routing in float64."""
    moe = layer().eval()
    uneven(moe, load)
    x = torch.rand(4, 32, 32)
    weight = torch.randn_like(x)
    exact = layer().double()
    exact.load_state_dict(moe.state_dict())
    gate_TK, expert_TK = (t.detach() for t in moe.router(x.flatten(0, 1)))

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = moe(x)[0]
    (y * weight).sum().backward()

    x_TD = x.flatten(0, 1).double()
    expected = by_token(exact, x_TD, gate_TK.double(), expert_TK).view_as(x)
    (expected * weight).sum().backward()
    pairs = [(y, expected),
             (moe.w1_EDF.grad, exact.w1_EDF.grad),
             (moe.w2_EFD.grad, exact.w2_EFD.grad)]
    for ours, reference in pairs:
        assert ours.isfinite().all()
        assert (ours - reference).norm() < limit * reference.norm()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("twin", [grouped_experts, all_experts])
@pytest.mark.parametrize("laid_out", [False, True])
def test_twins_of_the_loop_agree_with_it(laid_out, twin, dtype, limit):
    """With the weights as training leaves them, and laid out for decoding."""
    moe = layer().eval().to(dtype).requires_grad_(False)
    x = torch.randn(6, 32).to(dtype)
    routed = moe.router(x)
    plain = loop_over_experts(x, *routed, moe.w1_EDF, moe.w2_EFD)
    if laid_out:
        lay_out_for_decoding(moe)

    y = twin(x, *routed, moe.w1_EDF, moe.w2_EFD)

    torch.testing.assert_close(y, plain, atol=limit, rtol=0.02)


def test_routes_as_mixtral_does():
    """With noise off, the gates of transformers' Mixtral on the same logits."""
    transformers = pytest.importorskip("transformers")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    moe = layer().eval()
    x = torch.randn(50, 32)
    config = transformers.MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=3)
    router = mixtral.MixtralTopKRouter(config)
    router.weight.data = moe.router.weight_DE.data.t().clone()

    gate_TK, expert_TK = moe.router(x)
    _, their_gates, their_experts = router(x)

    ours = torch.zeros(50, 8).scatter(1, expert_TK, gate_TK)
    theirs = torch.zeros(50, 8).scatter(1, their_experts, their_gates)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("experts", [1, 2, 8, 60])
def test_top_experts_is_topk(experts):
    logits = torch.randn(200, experts)
    for k in {1, min(4, experts), experts}:
        assert torch.equal(top_experts(logits, k), logits.topk(k, dim=1)[1])


def test_parameter_counts():
    """876M, of which 474M are active, for config/moe_pretrain.py."""
    with torch.device("meta"):
        total, active = GPT(GPTConfig(n_expert=8, n_expert_per_tok=4)).n_params()
    assert abs(total / 876e6 - 1) < 0.01 and abs(active / 474e6 - 1) < 0.02


def chosen_twice(moe, x):
    """Whether the router chooses the same experts twice."""
    return torch.equal(moe.router(x)[1], moe.router(x)[1])


def test_noise_is_training_only_and_learned():
    """The noise's standard deviation is softplus(x · W_noise); evaluation has none."""
    moe = layer().train()
    x = torch.rand(3000, 32)             # positive, so W_noise decides softplus's sign
    moe.router.weight_DE.data.zero_()
    moe.router.noise_DE.data.zero_()
    assert not chosen_twice(moe, x)

    moe.router.noise_DE.data.fill_(-100)         # softplus(-large) is no noise
    assert chosen_twice(moe, x)

    moe.router.noise_DE.data.fill_(100)
    assert not chosen_twice(moe, x)
    moe.eval()
    assert all(torch.equal(a, b) for a, b in zip(moe.router(x), moe.router(x)))


@pytest.mark.parametrize("experts_per_token", [1, 3])
def test_the_language_loss_alone_teaches_the_router(experts_per_token):
    """Its weights and those of its noise both have a gradient, in every layer."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG | dict(n_expert_per_tok=experts_per_token))).train()
    idx = torch.randint(101, (4, 32))

    loss, _ = model(idx, idx.roll(-1, 1))
    loss.backward()

    for block in model.blocks:
        router = block.ffn.router
        assert router.weight_DE.grad.norm() > 1e-6 and router.noise_DE.grad.norm() > 1e-6


def test_router_computes_in_float32_under_autocast():
    moe = layer().eval()
    x = torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        gate, expert = moe.router(x)
    assert gate.dtype == torch.float32 and torch.equal(gate, moe.router(x)[0])


def test_one_expert_per_token_is_scaled_by_its_probability():
    """Its gate is that of a softmax over all experts."""
    moe = layer(n_expert_per_tok=1).eval()
    x = torch.randn(50, 32)

    gate, expert = moe.router(x)

    p = (x @ moe.router.weight_DE).softmax(1)
    torch.testing.assert_close(gate, p.max(1, keepdim=True)[0])
    assert torch.equal(expert, p.argmax(1, keepdim=True))


@pytest.mark.parametrize("gate, expert", [
    (torch.full((2, 2), 0.5), torch.tensor([[0, 1], [2, 3]])),
    (torch.full((4, 1), 0.4), torch.arange(4)[:, None]),
], ids=["two experts per token", "one"])
def test_balance_loss_of_an_even_load_is_0(gate, expert):
    assert balance_loss(gate, expert, 4).abs() < 1e-6


def test_balance_loss_is_the_divergence_from_an_even_load():
    """KL(uniform ‖ mean gate); finite for experts that nobody chose."""
    gate_TK = torch.tensor([[0.9, 0.1], [0.6, 0.4]], requires_grad=True)
    expert_TK = torch.tensor([[0, 1], [2, 3]])

    loss = balance_loss(gate_TK, expert_TK, 4)
    with_empty_experts = balance_loss(gate_TK, expert_TK, 8)
    with_empty_experts.backward()

    expected = sum(0.25 * math.log(0.25 / mean) for mean in (0.45, 0.05, 0.3, 0.2))
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert with_empty_experts.isfinite() and with_empty_experts > 1
    assert gate_TK.grad.isfinite().all()


def test_loads_add_up():
    """The load that is logged: the experts' shares of each layer's tokens sum to 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG)).eval()
    idx = torch.randint(101, (4, 32))

    _, (balance, load) = model(idx, idx)

    assert load.shape == (2, 8) and torch.allclose(load.sum(1), torch.ones(2))
    assert balance >= 0


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype, loss_limit, limit", [
    (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 0.1)], ids=["float32", "bfloat16"])
def test_compiles_whole(dtype, loss_limit, limit, fast):
    """fullgraph=True in training: the loss and gradients of no compiler (noise off)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG | dict(n_layer=1))).train()
    if fast:
        model.use_fast(compiled=True)
    for block in model.blocks:
        block.ffn.router.eval()
    idx = torch.randint(101, (4, 32))

    losses, gradients = [], []
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, (balance, _) = run(idx, idx.roll(-1, 1))
        (loss + balance).backward()
        losses.append(loss.item())
        own = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(own))

    assert losses[1] == pytest.approx(losses[0], rel=loss_limit)
    plain, compiled = gradients
    assert (compiled - plain).norm() < limit * plain.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("load", LOADS)
def test_on_a_gpu_it_is_near_float64(load):
    """In bfloat16, within its rounding of the float64 loop over tokens."""
    moe = layer(n_embd=64, n_inner=128).eval()
    uneven(moe, load)
    exact = layer(n_embd=64, n_inner=128).double()
    exact.load_state_dict(moe.state_dict())
    moe.cuda()
    x = torch.rand(4, 32, 64)
    x_TD = x.flatten(0, 1)

    with torch.autocast("cuda", torch.bfloat16):
        y = moe(x.cuda())[0].cpu()

    gate_TK, expert_TK = (t.detach().cpu() for t in moe.router(x_TD.cuda()))
    expected = by_token(exact, x_TD.double(), gate_TK.double(), expert_TK).view_as(x)
    assert (y - expected).norm() < 0.02 * expected.norm()
