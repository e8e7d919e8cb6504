"""Triton kernels that draw the next tokens: decode_ops.sample_next, and sampling.sample.

Three kernels find the k largest logits. A logit's rank is the number of larger ones, so nothing is
sorted: of parts of 32 logits, the k whose maxima are largest hold the k largest logits; of these
k · 32, those of the first k ranks are kept. A fourth draws from them. Equal numbers rank by their
place.
"""
import torch
import triton
import triton.language as tl

from minillm.speed import decode_ops
from minillm.speed.launch import count_before, fresh, launch, wait

PART = tl.constexpr(decode_ops.PART)
BLOCK = tl.constexpr(1024)           # numbers that a program compares its own with, at a time
RANKS = tl.constexpr(decode_ops.MOST_CHOSEN)
UNIT = tl.constexpr(decode_ops.TO_UNIT)


@triton.jit
def penalized(logits, seen, penalty, ids, real):
    """The logits of `ids`, as sampling.penalize leaves them, -inf for a NaN.

    seen: None without a penalty.
    """
    logit = tl.load(logits + ids, mask=real, other=-float("inf"), cache_modifier=".cg")
    if seen is not None:
        hit = tl.load(seen + ids, mask=real, other=0, cache_modifier=".cg") != 0
        damped = tl.where(logit > 0, logit / penalty, logit * penalty)
        logit = tl.where(hit, damped, logit)
    # no NaN is larger than another: all would have rank 0, and the places of other ranks keep
    # whatever was in memory
    return tl.where(logit == logit, logit, -float("inf"))


@triton.jit
def part_maxima_kernel(logits, seen, penalty, maxima, step, vocab_size, stride, n_parts,
                       OVERLAP: tl.constexpr):
    """maxima (B, n_parts): the largest logit of each part of PART. The step is counted here."""
    wait(OVERLAP)
    row = tl.program_id(1)
    if (row == 0) & (tl.program_id(0) == 0):
        tl.store(step, tl.load(step) + 1)        # here nobody reads it: draw_kernel does
    logits += row * stride
    if seen is not None:
        seen += row * vocab_size
    part = tl.program_id(0) * PART + tl.arange(0, PART)
    ids = part[:, None] * PART + tl.arange(0, PART)[None, :]
    largest = tl.max(penalized(logits, seen, penalty, ids, ids < vocab_size), 1)
    tl.store(maxima + row * n_parts + part, largest, mask=part < n_parts)


@triton.jit(do_not_specialize=["k"])     # clients choose it: compile once
def rank_parts_kernel(maxima, parts, n_parts, k, OVERLAP: tl.constexpr):
    """parts (B, k): those with the k largest maxima, in falling order."""
    wait(OVERLAP)
    maxima += tl.program_id(1) * n_parts
    mine = tl.program_id(0) * PART + tl.arange(0, PART)
    value = tl.load(maxima + mine, mask=mine < n_parts, other=-float("inf"), cache_modifier=".cg")
    rank = tl.zeros((PART,), tl.int32)
    for start in range(0, n_parts, BLOCK):
        place = start + tl.arange(0, BLOCK)
        others = tl.load(maxima + place, mask=place < n_parts, other=-float("inf"),
                         cache_modifier=".cg")
        rank += count_before(value, mine, others, tl.where(place < n_parts, place, 2**30))
    tl.store(parts + tl.program_id(1) * k + rank, mine, mask=(mine < n_parts) & (rank < k))


@triton.jit(do_not_specialize=["k"])
def rank_logits_kernel(logits, seen, penalty, parts, values, ids, vocab_size, stride, k,
                       OVERLAP: tl.constexpr):
    """values, ids (B, k): the k largest logits of these parts, in falling order."""
    wait(OVERLAP)
    row = tl.program_id(1)
    logits += row * stride
    if seen is not None:
        seen += row * vocab_size
    parts += row * k
    mine = tl.load(parts + tl.program_id(0), cache_modifier=".cg") * PART + tl.arange(0, PART)
    value = penalized(logits, seen, penalty, mine, mine < vocab_size)
    rank = tl.zeros((PART,), tl.int32)
    for start in range(0, k * PART, BLOCK):
        place = start + tl.arange(0, BLOCK)
        part = tl.load(parts + place // PART, mask=place < k * PART, other=2**25,
                       cache_modifier=".cg")
        other = part * PART + place % PART
        others = penalized(logits, seen, penalty, other, other < vocab_size)
        rank += count_before(value, mine, others, other)
    kept = (mine < vocab_size) & (rank < k)
    tl.store(values + row * k + rank, value, mask=kept)
    tl.store(ids + row * k + rank, mine, mask=kept)


@triton.jit
def mix(x):
    """sampling.mix."""
    for _ in tl.static_range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["k"])
def draw_kernel(values, ids, u, step, token, seen, vocab_size, steps, k, temperature, top_p,
                OVERLAP: tl.constexpr):
    """sampling.sample of a row's k kept logits → token, which counts as seen."""
    wait(OVERLAP)
    row = tl.program_id(0)
    rank = tl.arange(0, RANKS)
    value = tl.load(values + row * k + rank, mask=rank < k, other=-float("inf"),
                    cache_modifier=".cg")
    number = fresh(ids + row * k + rank, rank < k).to(tl.int64)
    p = tl.exp((value - tl.max(value, 0)) / temperature)
    p = p / tl.sum(p, 0)
    if top_p < 1:
        p = tl.where(tl.cumsum(p, 0) - p < top_p, p, 0)
    this_u = tl.load(u + row * steps + tl.load(step) - 1)
    bits = mix(number + 1) ^ (this_u * 2**24).to(tl.int64)
    uniform = (mix(bits).to(tl.float32) + 0.5) * UNIT
    # in float64, where float32 would need log1p
    noise = -tl.log(1 - uniform.to(tl.float64)).to(tl.float32)
    choice = tl.argmin(tl.where(p > 0, noise / p, float("inf")), 0)
    drawn = tl.sum(tl.where(rank == choice, number, 0), 0)
    tl.store(token + row, drawn)
    if seen is not None:
        tl.store(seen + row * vocab_size + drawn, 1)


def sample_next(state, logits, params):
    """For float32 logits, and settings for which decode_ops.can_draw is True."""
    seen = state.seen.view(torch.uint8) if params.repetition_penalty != 1 else None
    draw(logits[:, : state.seen.shape[1]], state.u, state.step, state.token, *params.for_sample(),
         seen, float(params.repetition_penalty))


def sample(logits, u, temperature, top_k, top_p):
    """sampling.sample, for settings for which decode_ops.from_few is True."""
    step = torch.zeros(1, dtype=torch.long, device=u.device)
    token = torch.empty(len(u), dtype=torch.long, device=u.device)
    draw(logits.float(), u, step, token, temperature, top_k, top_p)
    return token


def draw(logits, u, step, token, temperature, top_k, top_p, seen=None, penalty=1.0):
    """Draw from logits (B, V) into `token`. u: (B, steps), of which `step` is used, or (B,)."""
    B, vocab_size = logits.shape
    k, stride = decode_ops.chosen(temperature, top_k, top_p), logits.stride(0)
    n_parts = triton.cdiv(vocab_size, PART.value)
    maxima, values = logits.new_empty(B, n_parts), logits.new_empty(B, k)
    parts, ids = torch.empty(2, B, k, dtype=torch.int32, device=logits.device)
    programs = (triton.cdiv(n_parts, PART.value), B)
    launch(part_maxima_kernel, programs, logits, seen, penalty, maxima, step, vocab_size, stride,
           n_parts)
    launch(rank_parts_kernel, programs, maxima, parts, n_parts, k)
    launch(rank_logits_kernel, (k, B), logits, seen, penalty, parts, values, ids, vocab_size,
           stride, k)
    # of a single token any temperature will do
    temperature = max(float(temperature), decode_ops.GREEDY_BELOW)
    launch(draw_kernel, (B,), values, ids, u, step, token, seen, vocab_size, u.stride(0), k,
           temperature, float(top_p))
