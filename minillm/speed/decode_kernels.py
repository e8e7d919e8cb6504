"""Triton kernels for decoding: the functions of decode_ops.py. What they share is in launch.py.

A single row has its kernels in matvec_kernels.py, several rows in matmul_kernels.py.
"""
import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from minillm.errors import UserError
from minillm.speed import matmul_kernels, matvec_kernels
from minillm.speed.decode_ops import weight_and_bias
from minillm.speed.launch import count_before, fresh, launch, wait


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
        raise UserError("compile=True needs experts whose weights grouped_mm.lay_out_for_decoding "
                        "has turned: leave compile out")
    chosen = route(moe.router.weight_DE.t(), v, moe.router.k)
    return kernels_for(x).add_experts(w1_EFD, w2_EDF, chosen, v, x, norm)


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


# ---- the router of an MoE

def route(weight_ED, v, K):
    """(gates (B, E), 0 of experts not chosen; the chosen experts (B, K); their gates (B, K))."""
    x, norm = v if isinstance(v, tuple) else (v, None)
    (B, D), E = x.shape, len(weight_ED)
    gate_BE = x.new_empty(B, E, dtype=torch.float32)
    expert_BK = x.new_empty(B, K, dtype=torch.int32)
    gate_BK = gate_BE.new_empty(B, K)
    experts = next_power_of_2(E)
    # no fusion: a product fused with an addition rounds differently in each thread that holds the
    # same sum, and a logit would no longer equal itself
    launch(route_kernel, (B,), weight_ED, x, None if norm is None else norm.weight, gate_BE,
           expert_BK, gate_BK, E, 0.0 if norm is None else norm.eps, K=K,
           RANKS=next_power_of_2(K), WIDTH=D, EXPERTS=experts,
           COLUMNS=min(next_power_of_2(D), max(8192 // experts, 32)), enable_fp_fusion=False)
    return gate_BE, expert_BK, gate_BK


@triton.jit
def route_kernel(weight, x, norm, gate_BE, expert_BK, gate_BK, n_expert, eps, K: tl.constexpr,
                 RANKS: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr,
                 COLUMNS: tl.constexpr, OVERLAP: tl.constexpr):
    """One row. An expert's rank is the number of experts with larger logits."""
    row = tl.program_id(0)
    expert, column = tl.arange(0, EXPERTS), tl.arange(0, COLUMNS)
    inside = expert < n_expert
    w = tl.load(weight + expert[:, None] * WIDTH + column,
                mask=inside[:, None] & (column < WIDTH), other=0)
    wait(OVERLAP)
    logit = tl.zeros((EXPERTS,), tl.float32)
    squares = 0.0
    for start in range(0, WIDTH, COLUMNS):
        v = fresh(x + row * WIDTH + column, column < WIDTH).to(tl.float32)
        if norm is not None:
            squares += tl.sum(v * v, 0)
            v = v * tl.load(norm + column, mask=column < WIDTH, other=0)
        logit += tl.sum(w.to(tl.float32) * v[None, :], 1)
        column += COLUMNS
        w = tl.load(weight + expert[:, None] * WIDTH + column,
                    mask=inside[:, None] & (column < WIDTH), other=0)
    if norm is not None:
        logit = logit * tl.rsqrt(squares / WIDTH + eps)
    logit = tl.where(inside, logit, -float("inf"))
    rank = count_before(logit, expert, logit, expert)
    gate = tl.exp(logit - tl.max(logit, 0))
    # one expert per token: as in moe.py a softmax over all of them
    gate = gate / tl.sum(gate if K == 1 else tl.where(rank < K, gate, 0), 0)
    tl.store(gate_BE + row * n_expert + expert, tl.where(rank < K, gate, 0), mask=inside)
    place = tl.arange(0, RANKS)
    hit = rank[None, :] == place[:, None]
    # minimum: of logits that are NaN all experts have rank 0
    chosen = tl.minimum(tl.sum(tl.where(hit, expert[None, :], 0), 1), n_expert - 1)
    tl.store(expert_BK + row * K + place, chosen, mask=place < K)
    tl.store(gate_BK + row * K + place, tl.sum(tl.where(hit, gate[None, :], 0), 1),
             mask=place < K)
