"""Training in 8 bits: products against float64, what is cut off or refused, a whole run."""
import math
from typing import NamedTuple

import pytest
import torch

from minillm.device import compile_for_training
from minillm.errors import UserError
from minillm.speed.fast_versions import use_float8
from minillm.speed.float8 import GRADIENT_SCALE, Float8Function, Float8Linear, to_float8
from minillm.speed.float8_experts import float8_experts
from minillm.speed.linear import Linear, LinearFunction
from model import GPT, GPTConfig
from support.training_runs import MOE, TINY, assert_same_run, finish, make_data, numbers

CPU = torch.device("cpu")
SHAPE = dict(block_size=48, vocab_size=211, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_those_of_the_rounded_numbers(compiled):
    """All three products, as near as bfloat16 allows to those of the operands in e4m3 and e5m2.

    All sizes differ.
    """
    torch.manual_seed(0)
    x = torch.randn(96, 64).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(80, 64)).requires_grad_()
    grad = torch.randn(96, 80).bfloat16() / 96
    linear = Float8Function.apply
    if compiled:
        linear = torch.compile(linear, fullgraph=True)

    y = linear(x, weight)
    y.backward(grad)

    scale = 448 / weight.abs().max().item()
    grad_scale = GRADIENT_SCALE * 96
    exact_x, exact_weight, exact_grad = x.detach().double(), weight.detach().double(), grad.double()
    x8 = x.detach().to(torch.float8_e4m3fn).double()
    weight8 = (weight.detach() * scale).to(torch.float8_e4m3fn).double() / scale
    grad8 = (grad.float() * grad_scale).to(torch.float8_e5m2).double() / grad_scale
    products = [                         # ours, of the rounded operands, of the exact ones
        (y.detach(), x8 @ weight8.t(), exact_x @ exact_weight.t()),
        (x.grad, grad8 @ weight8, exact_grad @ exact_weight),
        (weight.grad, grad8.t() @ x8, exact_grad.t() @ exact_x),
    ]
    for ours, rounded, exact in products:
        assert error(ours, rounded) < 0.003
        assert 0.02 < error(ours, exact) < 0.08
    assert error(weight.grad, grad8.t() @ x8) < 1e-5     # it is never in bfloat16
    assert y.dtype == x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_what_8_bits_cannot_hold():
    """Large numbers are cut off, zeros stay, and NaN is not hidden: train.py skips such a step."""
    x, weight = torch.ones(16, 16).bfloat16(), torch.eye(16)
    x[0, 0], x[1, 1] = 1e6, float("nan")

    y = Float8Function.apply(x, weight)
    of_zeros = Float8Function.apply(x[2:].repeat(8, 1), torch.zeros(32, 16))

    assert y[0, 0] == 448 and y[0, 1] == 1
    assert y[1].isnan().all() and y[2:].isfinite().all()
    assert (of_zeros == 0).all()


@pytest.mark.parametrize("dtype, most", [(torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)])
def test_beyond_the_range_is_the_largest_number_of_either_sign(dtype, most):
    beyond = torch.tensor([1e6, -1e6, math.inf, -math.inf])

    assert to_float8(beyond, 1, dtype).tolist() == [most, -most, most, -most]


@pytest.mark.parametrize("size", [1e-5, 1, 1000])
def test_gradients_of_a_mean_over_the_tokens_are_held(size):
    """Neither rounded to 0 nor cut off, though their scale is fixed."""
    x = torch.ones(16, 16).bfloat16().requires_grad_()

    y = Float8Function.apply(x, torch.eye(16))
    y.backward(torch.full_like(y, size / 16))

    assert x.grad.flatten().tolist() == pytest.approx([size / 16] * 256, rel=0.13)


def test_a_bias_is_added_in_the_type_of_the_product():
    layer = Float8Linear(16, 32)
    x = torch.randn(16, 16).bfloat16()

    with_bias = layer(x)
    bias, layer.bias = layer.bias, None

    assert with_bias.dtype == torch.bfloat16
    assert torch.equal(with_bias, layer(x) + bias.bfloat16())


class Input(NamedTuple):
    """What a layer asks of its input."""
    dtype: torch.dtype
    is_cuda: bool = True


def test_which_layers_keep_their_weights_gradient_in_float32():
    """On a GPU, in training with 16 bits of float32 weights; elsewhere it is nn.Linear."""
    layer, bfloat16 = Linear(4, 4), Input(torch.bfloat16)

    assert layer.matmul_function(bfloat16) is LinearFunction
    assert layer.matmul_function(Input(torch.float16)) is LinearFunction
    assert layer.matmul_function(Input(torch.float32)) is None
    assert layer.matmul_function(Input(torch.bfloat16, is_cuda=False)) is None
    with torch.no_grad():
        assert layer.matmul_function(bfloat16) is None
    assert layer.bfloat16().matmul_function(bfloat16) is None


def model_and_its_float8(device=CPU, **options):
    torch.manual_seed(3)
    models = [GPT(GPTConfig(**SHAPE | options)).to(device).use_fast(compiled=True)
              for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    use_float8(models[1], device, torch.bfloat16, 8 * 48)
    return models


def test_only_training_is_in_8_bits():
    """Validation, and programs that open the checkpoint, see 16 bits; the head is never in 8."""
    plain, model = model_and_its_float8(bias=True)
    idx = torch.randint(1, 211, (8, 48))
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 2 * 4
    assert model.state_dict().keys() == plain.state_dict().keys()

    assert torch.equal(model.eval()(idx), plain.eval()(idx))

    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model.train()(idx), plain.train()(idx)
    assert 0.003 < error(ours, theirs.double()) < 0.1


def test_an_moe_trains_in_8_bits():
    """Its attention's linear layers and its experts."""
    plain, model = model_and_its_float8(n_expert=4, n_expert_per_tok=2)
    idx = torch.randint(1, 211, (8, 48))
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 2 * 2
    assert all(block.ffn.experts is float8_experts for block in model.blocks)
    assert model.state_dict().keys() == plain.state_dict().keys()

    with torch.no_grad():
        assert torch.equal(model.eval()(idx), plain.eval()(idx))


def check_gradients(device, compiled):
    """Loss and gradients of a step against float64."""
    plain, model = model_and_its_float8(device)
    exact = plain.double()
    step = compile_for_training(model, device) if compiled else model
    idx = torch.randint(0, 211, (8, 49), device=device)

    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = step(idx[:, :-1], idx[:, 1:])
    (loss / 384).backward()
    expected, _ = exact(idx[:, :-1], idx[:, 1:])
    (expected / 384).backward()

    assert abs(loss.item() / expected.item() - 1) < 0.01
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert error(p.grad, q.grad) < 0.15, name


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_step(compiled):
    check_gradients(CPU, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_step_on_a_gpu(compiled):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with 8-bit products")
    check_gradients(torch.device("cuda"), compiled)


def losses(out_dir):
    return [record["loss"] for record in numbers(out_dir) if "loss" in record]


def fall(losses):
    """From the mean of the first five losses to that of the last five."""
    return sum(losses[:5]) / 5 - sum(losses[-5:]) / 5


@pytest.mark.parametrize("kind", [[], MOE], ids=["dense", "MoE"])
def test_a_training_run(kind, tmp_path):
    """--fp8=True learns as bfloat16 does; a run that stops and resumes ends with the same bits."""
    data = make_data(tmp_path / "data")
    # the run that stops at step 30 is validated there, so the others are too
    common = [*TINY, *kind, "--dtype=bfloat16", "--eval_interval=15", f"--data_dir={data}"]
    plain, float8, resumed = (tmp_path / name for name in ("plain", "float8", "resumed"))
    float8_common = [*common, "--fp8=True"]

    finish([*common, f"--out_dir={plain}"])
    said = finish([*float8_common, f"--out_dir={float8}"])
    finish([*float8_common, "--max_iters=30", "--lr_decay_iters=60", f"--out_dir={resumed}"])
    finish([*float8_common, "--init_from=resume", f"--out_dir={resumed}"])

    assert "fp8=True makes training on a CPU many times slower: it is for a GPU" in said
    assert_same_run(float8, resumed)
    assert losses(plain) != losses(float8)
    assert fall(losses(plain)) > 0.5
    assert fall(losses(float8)) == pytest.approx(fall(losses(plain)), rel=0.1)


@pytest.mark.parametrize("options, dtype, tokens, says", [
    ({}, torch.float32, 64, "bfloat16"),
    ({}, torch.bfloat16, 40, r"batch_size \* block_size is 40"),
    (dict(n_inner=100), torch.bfloat16, 64, "a layer is 100 wide"),
    (dict(n_inner=104, n_expert=4), torch.bfloat16, 64, "a layer is 104 wide"),
], ids=["float32", "40 tokens", "a width of 100", "an MoE's width of 104"])
def test_refused(options, dtype, tokens, says):
    model = GPT(GPTConfig(**SHAPE | options))

    with pytest.raises(UserError, match=says):
        use_float8(model, CPU, dtype, tokens)

    assert not any(isinstance(module, Float8Linear) for module in model.modules())
