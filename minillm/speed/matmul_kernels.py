"""Triton kernels for decoding several rows: seven per layer.

A program of a product computes some columns for up to 64 rows. A product with few columns is cut
along its sum as well, so that all multiprocessors have work; the kernel that adds the residual
stream joins the pieces and computes the next norm. Of an MoE all rows go through all experts, with
a gate of 0 where one was not chosen: the time goes into reading the weights.
"""
import math

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from minillm.speed.launch import fresh, launch, wait

# ---- the residual stream and its norms

def normalize(x, norm):
    return add_terms(x, None, None, norm)[1]


def add_terms(x, terms, bias, norm):
    """x, (B, D), plus the sum of terms, (n, B, D), and bias, (D,): (the sum, the same normalized).
    """
    out, v = x, torch.empty_like(x)
    if terms is not None:
        out = torch.empty_like(x)
    n = 0 if terms is None else len(terms)
    # more of them without a loop would take a minute to compile
    launch(add_terms_kernel, (len(x),), x, terms, bias, norm.weight, out, v, len(x), norm.eps,
           TERMS=n, AT_ONCE=min(n, 32), WIDTH=x.shape[1], COLUMNS=next_power_of_2(x.shape[1]))
    return out, v


@triton.jit
def add_terms_kernel(x, terms, bias, norm, out, v, batch, eps, TERMS: tl.constexpr,
                     AT_ONCE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
                     OVERLAP: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    real = column < WIDTH
    factor = tl.load(norm + column, mask=real, other=0)
    wait(OVERLAP)
    place = row * WIDTH + column
    y = fresh(x + place, real)
    if TERMS > 0:
        total = y.to(tl.float32)
        for first in range(0, TERMS, AT_ONCE):
            for term in tl.static_range(AT_ONCE):
                there = real & (first + term < TERMS)
                total += fresh(terms + (first + term) * batch * WIDTH + place, there)
        if bias is not None:
            total += tl.load(bias + column, mask=real, other=0).to(tl.float32)
        y = total.to(y.dtype)
        tl.store(out + place, y, mask=real)
    y = y.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, 0) / WIDTH + eps)
    tl.store(v + place, y * scale * factor, mask=real)


# ---- linear layers, and the experts of an MoE

def linear(weight, bias, v, silu, dtype):
    out = v.new_empty(len(v), len(weight), dtype=dtype or v.dtype)
    matmul(weight, v, out, bias=bias, silu=silu)
    return out


def add(weight, bias, y, x, norm):
    pieces = max(y.shape[1] // 1024, 2)
    if y.shape[1] % pieces:
        pieces = 1
    terms = x.new_empty(pieces, *x.shape, dtype=torch.float32)
    matmul(weight, y, terms, pieces=pieces)
    return add_terms(x, terms, bias, norm)


def add_experts(w1_EFD, w2_EDF, chosen, v, x, norm):
    E, F, D = w1_EFD.shape
    hidden_EBF = x.new_empty(E, len(x), F)
    matmul(w1_EFD, v, hidden_EBF, gates=chosen[0], silu=True)
    pieces = 1 if F % 2 else 2
    terms = x.new_empty(E * pieces, *x.shape, dtype=torch.float32)
    matmul(w2_EDF, hidden_EBF, terms, pieces=pieces)
    return add_terms(x, terms, None, norm)


def matmul(weight, x, out, bias=None, gates=None, silu=False, pieces=1):
    """silu(x @ weight.t() + bias) → out. What is None or False is left out.

    weight: (rows, width) or (E, rows, width), x: (B, width) or (E, B, width), out: (B, rows) or (E,
    B, rows). gates: (B, E), which scale `out`. pieces: of each sum, to be added later; out is
    (pieces, B, rows) then, or (E · pieces, B, rows).
    """
    experts = len(weight) if weight.dim() == 3 else 1
    rows, width = weight.shape[-2:]
    batch = x.shape[-2]
    block = min(max(next_power_of_2(batch), 16), 64)
    tile = min(max(next_power_of_2(rows * experts // 128), 16), 128)     # 128 programs or more
    columns = 64 if tile == 128 else 128
    launch(matmul_kernel, (triton.cdiv(rows, tile), triton.cdiv(batch, block), experts * pieces),
           weight, x, bias, gates, out, batch, rows, batch * width if x.dim() == 3 else 0,
           WIDTH=width, PIECES=pieces, BATCH=block, ROWS=tile, COLUMNS=columns, SILU=silu,
           num_stages=stages(x.device, (block + tile) * columns * weight.element_size()))


def stages(device, size):
    """How many tiles of `size` bytes a program has in flight: what shared memory holds, up to 4."""
    if device.type != "cuda":
        return 4
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return min(max((memory - 4096) // size, 1), 4)


@triton.jit
def matmul_kernel(weight, x, bias, gates, out, batch, rows, x_step, WIDTH: tl.constexpr,
                  PIECES: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, SILU: tl.constexpr, OVERLAP: tl.constexpr):
    """ROWS columns of the result for BATCH rows, of one expert, or of one of PIECES of the sum.

    x_step: how far one expert's x lies from the next one's.
    """
    LENGTH: tl.constexpr = WIDTH // PIECES
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    expert, piece = tl.program_id(2) // PIECES, tl.program_id(2) % PIECES
    here, inside = b < batch, row < rows
    weight += (expert.to(tl.int64) * rows + row[None, :]) * WIDTH + piece * LENGTH
    x += expert.to(tl.int64) * x_step + b[:, None] * WIDTH + piece * LENGTH
    y = tl.zeros((BATCH, ROWS), tl.float32)
    wait(OVERLAP)
    for start in range(0, LENGTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        real = column < LENGTH
        w = tl.load(weight + column[:, None], mask=inside[None, :] & real[:, None], other=0)
        v = tl.load(x + column[None, :], mask=here[:, None] & real[None, :], other=0)
        y = tl.dot(v.to(w.dtype), w, y, input_precision="ieee")
    if bias is not None:
        y = y + tl.load(bias + row, mask=inside, other=0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1 + tl.exp(-y))
    if gates is not None:
        n_expert = tl.num_programs(2) // PIECES
        y = y * fresh(gates + b * n_expert + expert, here)[:, None]
    place = (tl.program_id(2) * batch + b[:, None]).to(tl.int64) * rows + row[None, :]
    tl.store(out + place, y, mask=here[:, None] & inside[None, :])


# ---- attention

def attend(qkv, keys, values, rope, position, size):
    B, n_kv, slots, head_dim = keys.shape
    n_head = qkv.shape[1] // head_dim - 2 * n_kv
    out = qkv.new_empty(B, n_head * head_dim)
    scale = math.log2(math.e) * head_dim ** -0.5
    channels = max(next_power_of_2(head_dim), 16)
    launch(attend_kernel, (n_kv, B), qkv, keys, values, rope, position, out, slots, size,
           rope.shape[1], scale, N_HEAD=n_head, N_KV=n_kv, HEAD_DIM=head_dim,
           GROUP=max(next_power_of_2(n_head // n_kv), 16), CHANNELS=channels, SLOTS=32, warps=1,
           num_stages=stages(qkv.device, 64 * channels * keys.element_size()))
    return out


@triton.jit
def attend_kernel(qkv, keys, values, rope, position, out, slots, size, rope_rows, scale,
                  N_HEAD: tl.constexpr, N_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
                  GROUP: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
                  OVERLAP: tl.constexpr):
    """The query heads of one group of one row, (GROUP, CHANNELS) with padding.

    The new token's k and v go to the cache, and begin the sums; the older slots follow.
    """
    kv, row = tl.program_id(0), tl.program_id(1)
    HEADS: tl.constexpr = N_HEAD // N_KV
    HALF: tl.constexpr = HEAD_DIM // 2
    g, channel = tl.arange(0, GROUP), tl.arange(0, CHANNELS)
    real = channel < HEAD_DIM
    filled = (g < HEADS)[:, None] & real[None, :]
    # channel i is turned with its partner i + HALF, or i - HALF, which counts negative
    partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
    # embed_kernel wrote the position, and has ended: the kernel that is ahead waited for it
    here = tl.load(position + row).to(tl.int32)
    angle = tl.minimum(here, rope_rows - 1) * HALF + channel % HALF
    cos = tl.load(rope + angle, mask=real, other=0)
    sin = tl.load(rope + rope_rows * HALF + angle, mask=real, other=0)
    sin = tl.where(channel < HALF, -sin, sin)
    qkv += row * (N_HEAD + 2 * N_KV) * HEAD_DIM
    start_of_row = (row * N_KV + kv).to(tl.int64) * slots * HEAD_DIM
    keys += start_of_row
    values += start_of_row
    wait(OVERLAP)

    head = (kv * HEADS + g)[:, None] * HEAD_DIM
    q = fresh(qkv + head + channel[None, :], filled).to(tl.float32) * cos[None, :]
    q += fresh(qkv + head + partner[None, :], filled).to(tl.float32) * sin[None, :]
    new = qkv + (N_HEAD + kv) * HEAD_DIM
    k_new = fresh(new + channel, real).to(tl.float32) * cos
    k_new += fresh(new + partner, real).to(tl.float32) * sin
    v_new = fresh(new + N_KV * HEAD_DIM + channel, real)
    dtype = v_new.dtype
    tl.store(keys + here * HEAD_DIM + channel, k_new, mask=real)
    tl.store(values + here * HEAD_DIM + channel, v_new, mask=real)
    largest = tl.sum(q * k_new.to(dtype).to(tl.float32)[None, :], 1) * scale
    total = tl.full((GROUP,), 1.0, tl.float32)
    y = tl.zeros((GROUP, CHANNELS), tl.float32) + v_new.to(tl.float32)[None, :]
    q = q.to(dtype)
    for start in range(0, tl.where(here < size, here, 0), SLOTS):    # of padding nobody needs it
        slot = start + tl.arange(0, SLOTS)
        older = slot < here
        place = slot[:, None] * HEAD_DIM + channel[None, :]
        k = tl.load(keys + place, mask=older[:, None] & real[None, :], other=0)
        v = tl.load(values + place, mask=older[:, None] & real[None, :], other=0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(older[None, :], score, -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(score, 1))
        weight, shrink = tl.exp2(score - largest[:, None]), tl.exp2(before - largest)
        total = total * shrink + tl.sum(weight, 1)
        y = tl.dot(weight.to(dtype), v, y * shrink[:, None], input_precision="ieee")
    place = row * N_HEAD * HEAD_DIM + head + channel[None, :]
    tl.store(out + place, y / total[:, None], mask=filled)
