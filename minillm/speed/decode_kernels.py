"""Triton kernels for decoding: the functions of decode_ops.py. What they share is in launch.py.

A single row has its kernels in matvec_kernels.py, several rows in matmul_kernels.py.
"""
import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from minillm.speed import matmul_kernels, matvec_kernels
from minillm.speed.decode_ops import weight_and_bias
from minillm.speed.launch import launch, wait


def normalize(x, norm):
    return kernels_for(x).normalize(x, norm)


def linear(layer, v, silu=False, dtype=None):
    return kernels_for(v).linear(*weight_and_bias(layer), v, silu, dtype)


def attend(qkv, keys, values, rope, position, size):
    return kernels_for(qkv).attend(qkv, keys, values, rope, position, size)


def add(layer, y, x, norm):
    return kernels_for(x).add(*weight_and_bias(layer), y, x, norm)


def add_experts(moe, v, x, norm):
    """moe: its weights are laid out by grouped_mm.lay_out_for_decoding."""
    w1_EFD, w2_EDF = moe.w1_EDF.transpose(1, 2), moe.w2_EFD.transpose(1, 2)
    if not w1_EFD.is_contiguous() or not w2_EDF.is_contiguous():
        raise ValueError("the experts' weights are not laid out for decoding")
    router_ED, k = moe.router.weight_DE.t(), moe.router.k
    return kernels_for(x).add_experts(router_ED, w1_EFD, w2_EDF, k, v, x, norm)


def kernels_for(x):
    """x: what several rows have in (B, …); for a single row also a pair of tensors."""
    return matvec_kernels if isinstance(x, tuple) or len(x) == 1 else matmul_kernels


# ---- the tokens' embeddings

def embed(model, state, size):
    weight, B = model.wte.weight, len(state.token)
    x, position = weight.new_empty(B, weight.shape[1]), torch.empty_like(state.token[:, 0])
    launch(embed_kernel, (B,), weight, state.token, state.prompt_length, state.step, x, position,
           size, WIDTH=x.shape[1], COLUMNS=next_power_of_2(x.shape[1]))
    return x, position


@triton.jit
def embed_kernel(weight, token, prompt_length, step, x, position, size, WIDTH: tl.constexpr,
                 COLUMNS: tl.constexpr, OVERLAP: tl.constexpr):
    wait(OVERLAP)
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    numbers = tl.load(weight + tl.load(token + row) * WIDTH + column, mask=column < WIDTH)
    tl.store(x + row * WIDTH + column, numbers, mask=column < WIDTH)
    here = tl.load(prompt_length + row) + tl.load(step) - 1
    tl.store(position + row, tl.minimum(here, size))
