"""Triton kernels for decoding one row: five per layer, with an MoE six.

A program reads some rows of a matrix, whole, padded to a power of two. It asks for them before it
waits for its input. The product with a norm's output computes the norm itself, so here `v` is the
pair (x, norm).
"""
import math

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from minillm.speed.launch import fresh, launch, wait

TILE = 8192                          # weights that a program holds in its registers
SLOTS = 64                           # of the cache that a program of attend holds
MOST_PARTS = 8                       # of the cache, whose programs work side by side


def normalize(x, norm):
    return x, norm


# ---- a linear layer, with what stands before and after it

def linear(weight, bias, v, silu, dtype):
    x, norm = v
    return matvec(weight, bias, x, norm, silu=silu, dtype=dtype)


def add(weight, bias, y, x, norm):
    x = matvec(weight, bias, y, residual=x)
    return x, (x, norm)


def matvec(weight, bias, x, norm=None, residual=None, silu=False, dtype=None):
    """x: (1, in), or what attend returns. Returns (1, out)."""
    rows, width = weight.shape
    logs, n_head, parts, tile = None, 1, 1, TILE
    if isinstance(x, tuple):                     # every program joins the parts: fewer programs
        x, logs = x
        parts, n_head = logs.shape
        tile = 2 * TILE
    like = x if residual is None else residual
    out = like.new_empty(1, rows, dtype=dtype or like.dtype)
    columns = next_power_of_2(width)
    tile_rows = max(tile // columns, 1)
    launch(matvec_kernel, (triton.cdiv(rows, tile_rows),), weight, x, logs,
           None if norm is None else norm.weight, bias, residual, out, rows,
           0.0 if norm is None else norm.eps, WIDTH=width, ROWS=tile_rows, COLUMNS=columns,
           N_HEAD=n_head, PARTS=parts, SILU=silu)
    return out


@triton.jit
def matvec_kernel(weight, x, logs, norm, bias, residual, out, rows, eps, WIDTH: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, N_HEAD: tl.constexpr,
                  PARTS: tl.constexpr, SILU: tl.constexpr, OVERLAP: tl.constexpr):
    """ROWS numbers of the result. What is None is left out; with logs, x are attend's sums."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside, real = row < rows, column < WIDTH
    w = tl.load(weight + row[:, None].to(tl.int64) * WIDTH + column,
                mask=inside[:, None] & real, other=0)
    if norm is not None:
        factor = tl.load(norm + column, mask=real, other=0)
    if bias is not None:
        shift = tl.load(bias + row, mask=inside, other=0).to(tl.float32)
    wait(OVERLAP)
    if logs is not None:
        head = column // (WIDTH // N_HEAD)
        v = joined(x + column, logs + head, real, WIDTH, N_HEAD, PARTS)
    else:
        v = fresh(x + column, real).to(tl.float32)
    if residual is not None:
        base = fresh(residual + row, inside).to(tl.float32)
    if norm is not None:
        v = v * tl.rsqrt(tl.sum(v * v, 0) / WIDTH + eps) * factor
    y = tl.sum(w.to(tl.float32) * v[None, :], 1)
    if bias is not None:
        y = y + shift
    if SILU:
        y = y / (1 + tl.exp(-y))
    if residual is not None:
        y = y + base
    tl.store(out + row, y, mask=inside)


@triton.jit
def joined(sums, logs, real, WIDTH: tl.constexpr, N_HEAD: tl.constexpr, PARTS: tl.constexpr):
    """Attention over all slots, from attend_kernel's parts: each weighs 2 ** log."""
    y, largest = fresh(sums, real), fresh(logs, real)
    total = tl.full(y.shape, 1.0, tl.float32)
    for part in tl.static_range(1, PARTS):
        more, log = fresh(sums + part * WIDTH, real), fresh(logs + part * N_HEAD, real)
        before, largest = largest, tl.maximum(largest, log)
        old, new = tl.exp2(before - largest), tl.exp2(log - largest)
        y, total = y * old + more * new, total * old + new
    return y / total


# ---- attention

def attend(qkv, keys, values, rope, position, size):
    """Returns (sums, logs), parts that matvec joins: what attend_kernel writes."""
    _, n_kv, slots, head_dim = keys.shape
    n_head = qkv.shape[1] // head_dim - 2 * n_kv
    parts = min(triton.cdiv(slots, SLOTS), MOST_PARTS)
    sums = qkv.new_empty(parts, n_head, head_dim, dtype=torch.float32)
    logs = sums.new_empty(parts, n_head)
    scale = math.log2(math.e) * head_dim ** -0.5
    launch(attend_kernel, (n_head, parts), qkv, keys, values, rope, position, sums, logs, slots,
           rope.shape[1], scale, N_HEAD=n_head, N_KV=n_kv, HALF=head_dim // 2,
           PAIRS=next_power_of_2(head_dim // 2), PARTS=parts, SLOTS=SLOTS)
    return sums, logs


@triton.jit
def attend_kernel(qkv, keys, values, rope, position, sums, logs, slots, rope_rows, scale,
                  N_HEAD: tl.constexpr, N_KV: tl.constexpr, HALF: tl.constexpr,
                  PAIRS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
                  OVERLAP: tl.constexpr):
    """One query head over one part of the cache: every PARTS-th block of SLOTS slots.

    sums (PARTS, N_HEAD, head_dim): attention over the part's slots alone; logs (PARTS, N_HEAD): the
    log2 of the sum of its exponentials, -inf where none of its slots is filled. RoPE turns the
    pairs (a, b) of q and of the new k; the first head of a group writes k and v to the cache.
    """
    GROUP: tl.constexpr = N_HEAD // N_KV
    HEAD_DIM: tl.constexpr = 2 * HALF
    head, part = tl.program_id(0), tl.program_id(1)
    pair, channel = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    turned, real = pair < HALF, channel < HEAD_DIM
    kv = head // GROUP
    keys += kv.to(tl.int64) * slots * HEAD_DIM
    values += kv.to(tl.int64) * slots * HEAD_DIM
    # embed_kernel wrote the position, and has ended: the kernel that is ahead waited for it
    here = tl.load(position).to(tl.int32)
    angle = tl.minimum(here, rope_rows - 1) * HALF + pair
    cos = tl.load(rope + angle, mask=turned, other=0)
    sin = tl.load(rope + rope_rows * HALF + angle, mask=turned, other=0)
    slot = part * SLOTS + tl.arange(0, SLOTS)
    k_a, k_b, v = older(keys, values, slot, here, pair, channel, HALF)
    wait(OVERLAP)

    q_a, q_b = turn(qkv + head * HEAD_DIM, pair, cos, sin, HALF)
    new = qkv + (N_HEAD + kv) * HEAD_DIM
    new_a, new_b = turn(new, pair, cos, sin, HALF)
    new_a, new_b = new_a.to(k_a.dtype), new_b.to(k_a.dtype)
    new_v = fresh(new + N_KV * HEAD_DIM + channel, real)
    if (part == here // SLOTS % PARTS) & (head % GROUP == 0):
        tl.store(keys + here * HEAD_DIM + pair, new_a, mask=turned)
        tl.store(keys + here * HEAD_DIM + HALF + pair, new_b, mask=turned)
        tl.store(values + here * HEAD_DIM + channel, new_v, mask=real)

    largest, total = -float("inf"), 0.0
    y = tl.zeros((2 * PAIRS,), tl.float32)
    for start in range(part * SLOTS, here + 1, PARTS * SLOTS):
        now = (slot == here)[:, None]
        a = tl.where(now, new_a[None, :], k_a).to(tl.float32)
        b = tl.where(now, new_b[None, :], k_b).to(tl.float32)
        content = tl.where(now, new_v[None, :], v).to(tl.float32)
        score = tl.sum(a * q_a[None, :] + b * q_b[None, :], 1) * scale
        score = tl.where(slot <= here, score, -float("inf"))
        # the next block is on its way while this one is summed
        slot += PARTS * SLOTS
        k_a, k_b, v = older(keys, values, slot, here, pair, channel, HALF)
        before, largest = largest, tl.maximum(largest, tl.max(score, 0))
        weight, shrink = tl.exp2(score - largest), tl.exp2(before - largest)
        total = total * shrink + tl.sum(weight, 0)
        y = y * shrink + tl.sum(weight[:, None] * content, 0)
    place = part * N_HEAD + head
    tl.store(logs + place, largest + tl.log2(total))
    tl.store(sums + place * HEAD_DIM + channel, y / tl.maximum(total, 1e-30), mask=real)


@triton.jit
def older(keys, values, slot, here, pair, channel, HALF: tl.constexpr):
    """The keys' pairs and the values of these slots; 0 from the new token's on."""
    filled = (slot < here)[:, None]
    row = slot[:, None] * (2 * HALF)
    k_a = fresh(keys + row + pair, filled & (pair < HALF))
    k_b = fresh(keys + row + HALF + pair, filled & (pair < HALF))
    v = fresh(values + row + channel, filled & (channel < 2 * HALF))
    return k_a, k_b, v


@triton.jit
def turn(x, pair, cos, sin, HALF: tl.constexpr):
    """apply_rope of one head."""
    a = fresh(x + pair, pair < HALF).to(tl.float32)
    b = fresh(x + HALF + pair, pair < HALF).to(tl.float32)
    return a * cos - b * sin, a * sin + b * cos


# ---- the experts of an MoE

def add_experts(w1_EFD, w2_EDF, chosen, v, x, norm):
    E, F, D = w1_EFD.shape
    _, expert_1K, gate_1K = chosen
    K, before = expert_1K.shape[1], v[1]
    hidden_KF, out = x.new_empty(K, F), torch.empty_like(x)
    columns = next_power_of_2(D)
    rows = max(TILE // columns, 1)
    launch(experts_up_kernel, (triton.cdiv(F, rows), K), w1_EFD, x, before.weight, expert_1K,
           gate_1K, hidden_KF, F, before.eps, WIDTH=D, ROWS=rows, COLUMNS=columns, warps=2)
    ranks, columns = next_power_of_2(K), next_power_of_2(F)
    rows = max(TILE // (ranks * columns), 1)
    launch(experts_down_kernel, (triton.cdiv(D, rows),), w2_EDF, hidden_KF, expert_1K, x, out, D,
           K=K, RANKS=ranks, WIDTH=F, ROWS=rows, COLUMNS=columns, warps=2)
    return out, (out, norm)


@triton.jit
def experts_up_kernel(w1, x, norm, experts, gates, hidden, rows, eps, WIDTH: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr):
    """hidden (K, F): silu(w1 @ norm(x)) · gate of each chosen expert."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    inside, real = row < rows, column < WIDTH
    factor = tl.load(norm + column, mask=real, other=0)
    wait(OVERLAP)
    expert = tl.load(experts + rank, cache_modifier=".cg").to(tl.int64)
    w = tl.load(w1 + (expert * rows + row)[:, None] * WIDTH + column,
                mask=inside[:, None] & real, other=0)
    v = fresh(x + column, real).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / WIDTH + eps) * factor
    y = tl.sum(w.to(tl.float32) * v[None, :], 1)
    y = y / (1 + tl.exp(-y)) * tl.load(gates + rank, cache_modifier=".cg")
    tl.store(hidden + rank * rows + row, y, mask=inside)


@triton.jit
def experts_down_kernel(w2, hidden, experts, x, out, rows, K: tl.constexpr, RANKS: tl.constexpr,
                        WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                        OVERLAP: tl.constexpr):
    """ROWS numbers of x plus the sum of w2 @ hidden over the chosen experts."""
    line, column = tl.arange(0, RANKS * ROWS), tl.arange(0, COLUMNS)
    rank, row = line // ROWS, tl.program_id(0) * ROWS + line % ROWS
    real = ((rank < K) & (row < rows))[:, None] & (column < WIDTH)[None, :]
    # route_kernel chose the experts, and has ended: experts_up_kernel, which is ahead, waited
    expert = fresh(experts + rank, rank < K).to(tl.int64)
    w = tl.load(w2 + (expert * rows + row)[:, None] * WIDTH + column[None, :], mask=real, other=0)
    wait(OVERLAP)
    h = fresh(hidden + rank[:, None] * WIDTH + column[None, :], real).to(tl.float32)
    y = tl.sum(w.to(tl.float32) * h, 1)
    y = tl.sum(tl.reshape(y, (RANKS, ROWS)), 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y += fresh(x + row, row < rows).to(tl.float32)
    tl.store(out + row, y, mask=row < rows)
