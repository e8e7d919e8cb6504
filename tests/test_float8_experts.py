"""8-bit experts: matmuls and gradients against float64, empty experts, what is cut off."""
import pytest
import torch

from minillm.errors import UserError
from minillm.speed import fast_versions
from minillm.speed.float8_experts import float8_experts, float8_mm
from minillm.speed.grouped_mm import grouped_experts
from moe import loop_over_experts

E4M3 = torch.float8_e4m3fn
N, D, E, K, INNER = 96, 64, 8, 3, 80            # all sizes differ
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def hopper(device):
    """`device`, if it has the matmul."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs a GPU with 8-bit matmuls for experts")
    return device


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def choose(load, device="cpu"):
    """Gates and experts (N, K): "even", "one takes most", or "half are empty"."""
    logits = torch.randn(N, E)
    if load == "one takes most":
        logits[:, 2] += 9
    elif load == "half are empty":
        logits[:, ::2] = -99
    top_NK, expert_NK = logits.topk(K, dim=1)
    return top_NK.softmax(1).to(device), expert_NK.to(device)


def inputs(load="even", device="cpu"):
    """x, gates, experts, w1, w2, and the gradient of the output."""
    torch.manual_seed(0)
    gate_NK, expert_NK = choose(load, device)
    x = torch.randn(N, D, device=device).bfloat16()
    w1 = 0.1 * torch.randn(E, D, INNER, device=device)
    w2 = 0.02 * torch.randn(E, INNER, D, device=device)
    grad = torch.randn(N, D, device=device).bfloat16() / N
    return x, gate_NK, expert_NK, w1, w2, grad


def run(experts, x, gate, expert, w1, w2, grad):
    """[y, the gradients of x, gates, w1 and w2]."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate, w1, w2)]
    y = experts(leaves[0], leaves[1], expert, leaves[2], leaves[3])
    y.backward(grad)
    return [y.detach()] + [leaf.grad for leaf in leaves]


def run_exact(x, gate, expert, w1, w2, grad):
    return run(loop_over_experts, x.double(), gate.double(), expert, w1.double(), w2.double(),
               grad.double())


@pytest.mark.parametrize("device", DEVICES)
def test_matmul_is_that_of_the_rounded_numbers(device):
    """Groups of any size, and none: 5 rows, 0, 59, 1, 95; each matrix has a scale."""
    device = hopper(device)
    torch.manual_seed(0)
    ends = [5, 5, 64, 65, 160]
    offset_E = torch.tensor(ends, dtype=torch.int32, device=device)
    scale_E = torch.tensor([2.0, 1.0, 0.5, 100.0, 3.0], device=device)
    rows = torch.randn(160, 48, device=device).to(E4M3)
    weights = torch.randn(5, 80, 48, device=device).to(E4M3)

    y = float8_mm(rows, weights, scale_E, offset_E)

    assert y.dtype == torch.bfloat16 and y.shape == (160, 80)
    for expert, (start, end) in enumerate(zip([0, *ends], ends)):
        exact = rows[start:end].double() @ weights[expert].double().t() / scale_E[expert]
        assert (y[start:end].double() - exact).norm() <= 0.003 * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("load", ["even", "one takes most", "half are empty"])
def test_near_float64(load, compiled, device):
    """Output and gradients are as far from the exact ones as 8 bits make them."""
    x, gate, expert, w1, w2, grad = inputs(load, hopper(device))
    experts = float8_experts
    if compiled:
        experts = torch.compile(experts, fullgraph=True, dynamic=False)

    ours = run(experts, x, gate, expert, w1, w2, grad)
    exact = run_exact(x, gate, expert, w1, w2, grad)

    for got, expected in zip(ours, exact):
        assert 0.02 < error(got, expected) < 0.07
    types = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert [got.dtype for got in ours] == types
    if load == "half are empty":
        assert ours[3][::2].eq(0).all() and ours[4][::2].eq(0).all()


def powers_of_two(shape, low, high):
    """Of either sign: 8 bits hold them exactly."""
    return torch.randint(low, high, shape).float().exp2() * (torch.randint(0, 2, shape) * 2 - 1)


def test_weights_gradients_are_those_of_16_bits():
    """Where 8 bits hold the numbers exactly, only the roundings to bfloat16 are left."""
    _, gate, expert, _, _, _ = inputs()
    x = powers_of_two((N, D), -2, 2).bfloat16()
    w1 = powers_of_two((E, D, INNER), -6, -3)
    w2 = powers_of_two((E, INNER, D), -6, -3)
    # a token's gradient is exact if it has one number: the others are 0
    grad = torch.zeros(N, D).bfloat16()
    grad[range(N), torch.randint(0, D, (N,))] = torch.randn(N).bfloat16() / N

    ours = run(float8_experts, x, gate, expert, w1, w2, grad)
    exact = run_exact(x, gate, expert, w1, w2, grad)

    assert error(ours[1], exact[1]) > 0.015          # of x: the hidden gradient is in 8 bits
    assert error(ours[3], exact[3]) < 0.006
    assert error(ours[4], exact[4]) < 0.006


def test_tokens_with_small_gradients_lose_nothing():
    """Each has a scale of its own: 2^-30 times the gradient gives 2^-30 times that of x."""
    *others, grad = inputs()
    tiny = torch.ones(N, 1).bfloat16()
    tiny[::3] = 2.0**-30

    usual = run(float8_experts, *others, grad)
    small = run(float8_experts, *others, grad * tiny)

    assert torch.equal(usual[1] * tiny, small[1])


@pytest.mark.parametrize("outlier", [1, 100])
def test_the_largest_hidden_gradients_are_not_cut_off(outlier):
    """Nor do they lose anything if an outlier in one expert makes their scale small."""
    x, gate, expert, w1, w2, _ = inputs()
    # all rows of weights are equally long, and the gradient has the direction of one of them
    w2 = 0.02 * w2.sign()
    w2[:, 0] = w2[0, 0]
    grad = (w2[0, 0] / N).expand(N, D).bfloat16()
    w2[1, 0, 0] *= outlier
    # there SiLU has its largest slope
    x[:, 0] = 2.4
    w1[:, :, 0] = 0
    w1[:, 0, 0] = 1

    ours = run(float8_experts, x, gate, expert, w1, w2, grad)
    exact = run_exact(x, gate, expert, w1, w2, grad)

    for got, expected in zip(ours, exact):
        assert error(got, expected) < 0.07


def test_gradients_of_any_size_are_as_exact():
    """Nothing in them is fixed: 2^-40 times the loss gives 2^-40 times the gradients."""
    *others, grad = inputs()
    tiny = 2.0**-40

    usual = run(float8_experts, *others, grad)
    small = run(float8_experts, *others, grad * tiny)
    none = run(float8_experts, *others, grad * 0)

    for gradient, smaller, zero in zip(usual[1:], small[1:], none[1:]):
        assert torch.equal(gradient * tiny, smaller)
        assert (zero == 0).all()


def test_weights_of_any_size_are_as_exact():
    """The hidden rows' gradient has a scale of its own: w2 may be small, as at the start."""
    x, gate, expert, w1, w2, grad = inputs()
    w2 = w2 * 2.0**-10

    ours = run(float8_experts, x, gate, expert, w1, w2, grad)
    exact = run_exact(x, gate, expert, w1, w2, grad)

    for got, expected in zip(ours, exact):
        assert error(got, expected) < 0.08


def test_what_8_bits_cannot_hold():
    """Large numbers are cut off; NaN and infinity are not hidden: train.py skips such a step."""
    x, gate, expert, w1, w2, grad = inputs()
    large, bad = x.clone(), x.clone()
    large[0, 0], bad[1, 1] = 1e6, float("nan")
    bad_grad = grad.clone()
    bad_grad[2, 2] = float("inf")

    of_large = run(float8_experts, large, gate, expert, w1, w2, grad)
    of_bad = run(float8_experts, bad, gate, expert, w1, w2, grad)
    of_bad_grad = run(float8_experts, x, gate, expert, w1, w2, bad_grad)

    large[0, 0] = 448
    cut_off = run(float8_experts, large, gate, expert, w1, w2, grad)
    equal = [torch.equal(*pair) for pair in zip(of_large, cut_off)]
    assert equal == [True, True, True, False, True]     # in the gradient of w1, x is in 16 bits
    assert of_bad[0][1].isnan().all() and of_bad[0][2:].isfinite().all()
    assert of_bad[3].isnan().any()
    assert not of_bad_grad[3].isfinite().all() and not of_bad_grad[4].isfinite().all()


def test_without_gradients_in_16_bits():
    x, gate, expert, w1, w2, _ = inputs()

    with torch.no_grad():
        ours = float8_experts(x, gate, expert, w1, w2)

    assert torch.equal(ours, grouped_experts(x, gate, expert, w1, w2))


@pytest.mark.parametrize("capability, n_expert, says", [
    ((8, 0), 0, "A GPU has no 8-bit matmuls: leave --fp8 out"),
    ((8, 9), 8, "A GPU has no 8-bit matmuls for experts: leave --fp8 out"),
    ((12, 0), 8, "A GPU has no 8-bit matmuls for experts: leave --fp8 out"),
    ((8, 9), 0, None),
    ((9, 0), 8, None),
], ids=["Ampere", "Ada, MoE", "consumer Blackwell, MoE", "Ada, dense", "Hopper, MoE"])
def test_which_gpus(capability, n_expert, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    if says:
        with pytest.raises(UserError, match=says):
            fast_versions.check_float8_gpu(torch.device("cuda"), n_expert)
    else:
        fast_versions.check_float8_gpu(torch.device("cuda"), n_expert)
