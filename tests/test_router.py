"""The router of an MoE and its load-balancing loss, by what they are said to compute."""
import math

import pytest
import torch

from model import GPTConfig
from moe import Router, balance_loss
from support.tiny_models import tiny_model


def router_of(n_expert=4):
    return Router(GPTConfig(n_embd=32, n_head=4, n_kv_head=2, n_inner=64, n_expert=n_expert,
                            n_expert_per_tok=2))


def test_the_noise_of_a_fresh_router_is_normal_around_0():
    """Of the standard deviation softplus(0) = log 2."""
    torch.manual_seed(0)
    router = router_of()
    router.weight_DE.data.zero_()

    noise = router.noisy_logits(torch.randn(20_000, 32))

    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(math.log(2), rel=0.02)
    within_one = (noise.abs() < math.log(2)).float().mean().item()
    assert within_one == pytest.approx(0.683, abs=0.01)


def test_tokens_in_bfloat16_are_routed_in_float32():
    torch.manual_seed(0)
    router, x = router_of().eval(), torch.randn(500, 32).bfloat16()

    gates, experts = router(x)
    expected_gates, expected_experts = router(x.float())

    assert gates.dtype == torch.float32
    assert torch.equal(gates, expected_gates) and torch.equal(experts, expected_experts)


def test_a_rarely_chosen_expert_counts_with_its_own_share():
    """One with a ten-thousandth of the gates is far from the floor, which is for one with none."""
    gate = torch.tensor([[0.9999, 0.0001]], requires_grad=True)
    expert = torch.tensor([[0, 1]])

    loss = balance_loss(gate, expert, n_expert=2)
    loss.backward()

    assert loss.item() == pytest.approx(-(math.log(1.9998) + math.log(0.0002)) / 2, rel=1e-5)
    assert gate.grad[0, 1].item() == pytest.approx(-0.5 / 0.0001, rel=1e-3)


def test_the_balance_loss_of_a_model_is_the_mean_over_its_layers():
    model, losses = tiny_model(n_expert=4, n_layer=3), []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda ffn, x, output: losses.append(output[1][0]))
    idx = torch.arange(20)[None]

    _, (balance, load) = model(idx, idx)

    assert len(losses) == 3 and load.shape == (3, 4)
    assert balance.item() == pytest.approx(sum(losses).item() / 3)
