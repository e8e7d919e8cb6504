"""Training with matrix products in 8-bit floating point, on GPUs that have them (Ada, Hopper and later). Dense models, bfloat16 beside it.

    python train.py config/pretrain.py --fp8=True

The four linear layers of a block compute all three of their products (forward, for the input's
gradient, for the weights') in 8 bits: activations and weights as e4m3 (3 bits of mantissa, up to
448), gradients as e5m2 (2 bits, up to 57,344). Embedding and head, attention, norms and the
optimizer are as without. Scales are what usually makes this long; here only the weights need one
that is measured, and nothing is remembered between two steps:
- activations have none. What comes out of a norm, of an average of values or of SiLU is of the order of 1, and rounding to e4m3
  errs by 2.6 % of a number down to 2^-6 and by less than 0.001 below. What is beyond 448 is cut
  off;
- gradients have a fixed one: that of a mean over N tokens is of the order of 1/N, and e5m2 spans 30 powers of two;
- a weight matrix is scaled by its largest element.
Validation, and whoever opens the checkpoint, multiplies in 16 bits.

Papers: 8-bit formats for deep learning, arXiv 2209.05433; fixed scales in place of measured ones
are modded-nanogpt's idea.
"""
import torch
import torch.nn as nn

from minillm.errors import UserError
from minillm.speed.linear import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GRADIENT_SCALE = 16      # times the number of tokens: in training the largest gradients then are near 30, the mean ones near 0.01


def to_float8(x, scale, dtype):
    """x · scale, rounded to `dtype`; what is beyond its range, infinity too, becomes its largest number. NaN stays."""
    most = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-most, most).to(dtype)


def scaled_mm(a, b, scale, dtype, fast=False):
    """a (N, K) @ b (M, K).t() / scale → (N, M) in `dtype`; a and b in 8 bits, copied if need be: Hopper's instruction wants rows in one piece.

    fast: sums of some 14 bits, made in the tensor cores alone.
    """
    one = torch.ones((), device=a.device)
    # F.scaled_mm is the public name, which torch 2.11 can call but not compile
    return torch._scaled_mm(a.contiguous(), b.contiguous().t(), one, one / scale, out_dtype=dtype, use_fast_accum=fast)


class Float8Linear(Linear):
    def matmul(self, x):
        return Float8Function if self.training else super().matmul(x)


class Float8Function(torch.autograd.Function):
    """x (N, K) in bfloat16, weight (M, K) in float32 → x @ weight.t() (N, M) in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = torch.finfo(E4M3).max / weight.detach().abs().amax().clamp(min=1e-20)
        x8, weight8 = to_float8(x, 1, E4M3), to_float8(weight, scale, E4M3)
        ctx.save_for_backward(x8, weight8, scale)
        return scaled_mm(x8, weight8, scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):
        x8, weight8, scale = ctx.saved_tensors
        grad_scale = GRADIENT_SCALE * len(grad)
        grad8 = to_float8(grad, grad_scale, E5M2)
        return scaled_mm(grad8, weight8.t(), scale * grad_scale, grad.dtype), scaled_mm(grad8.t(), x8.t(), grad_scale, torch.float32)


def use_float8(model, device, dtype, tokens):
    """Let `model` train in 8 bits, `tokens` at a time, on a loss that is their mean or near it. UserError where it can't."""
    if model.config.n_expert:
        raise UserError("--fp8=True is for dense models: of a mixture the experts' products are what counts, and they have no 8-bit form here")
    if dtype != torch.bfloat16:
        raise UserError(f"--fp8=True goes with --dtype=bfloat16, not {str(dtype).removeprefix('torch.')}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no 8-bit products: leave --fp8 out")
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    for size in {size for layer in layers for size in layer.weight.shape} | {tokens}:
        if size % 16:
            raise UserError(f"--fp8=True needs multiples of 16: {'batch_size * block_size' if size == tokens else 'a layer'} is {size}{' wide' * (size != tokens)}")
    for layer in layers:
        layer.__class__ = Float8Linear               # names and weights stay, and so do checkpoints
