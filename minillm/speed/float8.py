"""Training with 8-bit floating-point matmuls, on GPUs that have them (Ada, Hopper and later).

    python train.py config/pretrain.py --fp8=True

508,035 tokens/s instead of 439,163 in bfloat16 (H200, `python -m bench.train --fp8=True`, and
without the flag). The linear layers of a block compute all three of their matmuls (forward, for
the input's gradient, for the weights') in 8 bits: activations and weights as e4m3 (3 bits of
mantissa, up to 448), gradients as e5m2 (2 bits, up to 57,344). The experts of an MoE have their own
file, float8_experts.py. Everything else is as without: embedding and head, attention, norms,
router, optimizer, and all validation (in 16 bits).

Only the weights need a measured scale, and nothing is remembered between two steps:
- activations have none. The output of a norm, an average of values or SiLU is of the order of 1;
  rounding to e4m3 errs by 2.6% of a number down to 2^-6, below by less than 0.001. What exceeds 448
  is cut off;
- gradients have a fixed one: that of a mean over N tokens is of the order of 1/N, and e5m2 spans 30
  powers of two;
- a weight matrix is scaled by its largest element.

Papers: 8-bit formats for deep learning, arXiv 2209.05433. Fixed scales are modded-nanogpt's idea.
"""
import torch

from minillm.speed.linear import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# times the number of tokens: the largest gradients of a training are then near 30, the mean 0.01
GRADIENT_SCALE = 16


def to_float8(x, scale, dtype):
    """x · scale in `dtype`; beyond its range, and for infinity, its largest number. NaN stays."""
    most = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-most, most).to(dtype)


def scaled_mm(a, b, scale, dtype, fast=False):
    """a (N, K) @ b (M, K).t() / scale → (N, M) in `dtype`; a and b in 8 bits.

    They are copied if necessary: Hopper's instruction needs contiguous rows. fast: sums of about 14
    bits, made entirely in the tensor cores.
    """
    one = torch.ones((), device=a.device)
    # F.scaled_mm is the public name, which torch 2.11 can call but not compile
    a, b = a.contiguous(), b.contiguous().t()
    return torch._scaled_mm(a, b, one, one / scale, out_dtype=dtype, use_fast_accum=fast)


class Float8Linear(Linear):
    def matmul_function(self, x):
        return Float8Function if self.training else super().matmul_function(x)


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
        grad_x = scaled_mm(grad8, weight8.t(), scale * grad_scale, grad.dtype)
        grad_weight = scaled_mm(grad8.t(), x8.t(), grad_scale, torch.float32)
        return grad_x, grad_weight
