"""Training in 8 bits.

Its products against float64, what is cut off, what is refused, and a whole run.
"""
import pytest
import torch

from minillm.errors import UserError
from minillm.device import compile_for_training
from minillm.speed.float8 import GRADIENT_SCALE, Float8Linear, Float8Function, use_float8
from model import GPT, GPTConfig
from support.training_runs import TINY, assert_same_run, finish, make_data, numbers

CPU = torch.device("cpu")
SHAPE = dict(block_size=48, vocab_size=211, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_those_of_the_rounded_numbers(compiled):
    """All three, with sizes that all differ.

    As near to the products of what e4m3 and e5m2 make of the operands as bfloat16 lets them be.
    """
    torch.manual_seed(0)
    x, weight, grad = torch.randn(96, 64).bfloat16().requires_grad_(), (0.02 * torch.randn(80, 64)).requires_grad_(), torch.randn(96, 80).bfloat16() / 96
    y = (torch.compile(Float8Function.apply, fullgraph=True) if compiled else Float8Function.apply)(x, weight)
    y.backward(grad)
    scale, grad_scale = 448 / weight.abs().max().item(), GRADIENT_SCALE * 96
    x8 = x.detach().to(torch.float8_e4m3fn).double()
    weight8 = (weight.detach() * scale).to(torch.float8_e4m3fn).double() / scale
    grad8 = (grad.float() * grad_scale).to(torch.float8_e5m2).double() / grad_scale
    for ours, rounded, exact in ((y, x8 @ weight8.t(), x.double() @ weight.double().t()), (x.grad, grad8 @ weight8, grad.double() @ weight.double()),
                                 (weight.grad, grad8.t() @ x8, grad.double().t() @ x.double())):
        assert error(ours.detach(), rounded) < 0.003 and 0.02 < error(ours.detach(), exact.detach()) < 0.08
    assert y.dtype == x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_what_8_bits_cannot_hold():
    """Large numbers are cut off, a matrix of zeros stays one, and what is not a number is not hidden: train.py skips such a step."""
    x, weight = torch.ones(16, 16).bfloat16(), torch.eye(16)
    x[0, 0], x[1, 1] = 1e6, float("nan")
    y = Float8Function.apply(x, weight)
    assert y[0, 0] == 448 and y[0, 1] == 1 and y[1].isnan().all() and y[2:].isfinite().all()
    assert (Float8Function.apply(x[2:].repeat(8, 1), torch.zeros(32, 16)) == 0).all()


def model_and_its_float8(device=CPU, **options):
    torch.manual_seed(3)
    models = [GPT(GPTConfig(**SHAPE | options)).to(device).use_fast(compiled=True) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    use_float8(models[1], device, torch.bfloat16, 8 * 48)
    return models


def test_only_training_is_in_8_bits():
    """Validation, and other programs that open the checkpoint, see the weights in 16 bits.

    The head never is in 8.
    """
    plain, model = model_and_its_float8(bias=True)
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 2 * 4
    assert model.state_dict().keys() == plain.state_dict().keys()
    idx = torch.randint(1, 211, (8, 48))
    assert torch.equal(model.eval()(idx), plain.eval()(idx))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model.train()(idx), plain.train()(idx)
    assert 0.003 < error(ours, theirs.double()) < 0.1


def gradients_agree(device, compile):
    """Loss and gradients of a step against float64."""
    plain, model = model_and_its_float8(device)
    exact, idx = plain.double(), torch.randint(0, 211, (8, 49), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss, _ = (compile_for_training(model, device) if compile else model)(idx[:, :-1], idx[:, 1:])
    expected, _ = exact(idx[:, :-1], idx[:, 1:])
    (loss / 384).backward(), (expected / 384).backward()
    assert abs(loss.item() / expected.item() - 1) < 0.01
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert error(p.grad, q.grad) < 0.15, name


@pytest.mark.parametrize("compile", [False, True])
def test_gradients_of_a_step(compile):
    gradients_agree(CPU, compile)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with 8-bit products")
@pytest.mark.parametrize("compile", [False, True])
def test_gradients_of_a_step_on_a_gpu(compile):
    gradients_agree(torch.device("cuda"), compile)


def test_a_training_run(tmp_path):
    """train.py --fp8=True learns as it does in bfloat16, and a run that is stopped goes on with the same bits."""
    data = make_data(tmp_path / "data")
    # the run that stops at step 30 is validated there: the other one too
    common = [*TINY, "--dtype=bfloat16", "--eval_interval=15", f"--data_dir={data}"]
    finish([*common, f"--out_dir={tmp_path}/plain"])
    finish([*common, "--fp8=True", f"--out_dir={tmp_path}/float8"])
    finish([*common, "--fp8=True", "--max_iters=30", "--lr_decay_iters=60", f"--out_dir={tmp_path}/resumed"])
    finish([*common, "--fp8=True", "--init_from=resume", f"--out_dir={tmp_path}/resumed"])
    assert_same_run(f"{tmp_path}/float8", f"{tmp_path}/resumed")
    plain, ours = ([record["loss"] for record in numbers(f"{tmp_path}/{name}") if "loss" in record] for name in ("plain", "float8"))
    learned = [sum(losses[:5]) / 5 - sum(losses[-5:]) / 5 for losses in (plain, ours)]
    assert plain != ours and learned[0] > 0.5 and abs(learned[1] / learned[0] - 1) < 0.1, learned


@pytest.mark.parametrize("options, dtype, tokens, words", [
    (dict(n_expert=4), torch.bfloat16, 64, "dense"), ({}, torch.float32, 64, "bfloat16"), ({}, torch.bfloat16, 40, "batch_size \\* block_size is 40"),
    (dict(n_inner=100), torch.bfloat16, 64, "a layer is 100 wide")])
def test_refused(options, dtype, tokens, words):
    model = GPT(GPTConfig(**SHAPE | options))
    with pytest.raises(UserError, match=words):
        use_float8(model, CPU, dtype, tokens)
    assert not any(isinstance(module, Float8Linear) for module in model.modules())
