"""What decode_kernels.py and draw_kernels.py compute, in plain torch: the same functions.

Wherever a model decodes with the kernels, agreement.py compares these functions with model.py,
moe.py and sampling.py; tests compare the kernels with these. So they repeat every formula, and call
nothing that somebody may change. Change the kernels alike.
"""
from dataclasses import fields

import torch
from torch.nn import functional as F

PART = 32                            # logits among which a kernel looks for the largest
MOST_CHOSEN = 128                    # of more, ranking would take longer than sorting
GREEDY_BELOW, TO_UNIT = 1e-5, (1 - 2**-24) / 2**32
KNOWN = ["max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"]


def embed(model, state, size):
    """(the embeddings (B, D) of the newest tokens, their positions (B,), `size` at most)."""
    position = (state.prompt_length + state.step - 1).clamp(max=size)
    return model.wte.weight[state.token[:, 0]], position[:, 0]


def normalize(x, norm):
    """norm(x), an RMSNorm: (B, D)."""
    v = wide(x)
    v = v * (v.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    return v.to(x.dtype)


def linear(layer, v, silu=False, dtype=None):
    """layer(v), or silu of it: (B, out), in `dtype`, or else in that of v. Sums are float32.

    layer: an nn.Linear, or a weight (out, in); v: (B, in), of normalize, add or attend.
    """
    weight, bias = weight_and_bias(layer)
    y = wide(v) @ wide(weight).t()
    if bias is not None:
        y = y + bias
    if silu:
        y = F.silu(y)
    return y.to(dtype or v.dtype)


def add(layer, y, x, norm):
    """(x plus layer(y), (B, D); the same normalized)."""
    x = (x + linear(layer, y, dtype=wide(x).dtype)).to(x.dtype)
    return x, normalize(x, norm)


def attend(qkv, keys, values, rope, position, size):
    """Attention of the tokens at `position` (B,), for add: (B, n_head · head_dim).

    qkv: their q, k and v before RoPE. Writes their k and v to the cache's keys and values (B,
    n_kv_head, slots, head_dim). size: the position of padding, whose attention nobody needs.
    """
    B, n_kv, slots, head_dim = keys.shape
    heads = wide(qkv.view(B, -1, head_dim))
    cos, sin = rope[:, position.clamp(max=rope.shape[1] - 1), None]          # each (B, 1, half)
    a, b = heads[:, :-n_kv].chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    q, k = turned[:, :-n_kv], turned[:, -n_kv:]
    row = torch.arange(B, device=qkv.device)
    keys[row, :, position] = k.to(keys.dtype)
    values[row, :, position] = heads[:, -n_kv:].to(values.dtype)
    scores = q.view(B, n_kv, -1, head_dim) @ wide(keys).transpose(2, 3) * head_dim ** -0.5
    visible = torch.arange(slots, device=qkv.device) <= position[:, None, None, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)        # (B, n_kv, …, slots)
    return (weights @ wide(values)).reshape(B, -1).to(qkv.dtype)


def add_experts(moe, v, x, norm):
    """(x plus the chosen experts of v, (B, D); the same normalized)."""
    k = moe.router.k
    logits_BE = linear(moe.router.weight_DE.t(), v, dtype=wide(x).dtype)
    top_BK, expert_BK = logits_BE.topk(k)
    # one expert per token: as in moe.py a softmax over all of them
    gate_BK = logits_BE.softmax(1).gather(1, expert_BK) if k == 1 else top_BK.softmax(1)
    gate_BE = torch.zeros_like(logits_BE).scatter(1, expert_BK, gate_BK)
    y = wide(x)
    for gate_B, w1_DF, w2_FD in zip(gate_BE.t(), moe.w1_EDF, moe.w2_EFD):
        hidden = linear(w1_DF.t(), v, silu=True, dtype=y.dtype) * gate_B[:, None]
        y = y + linear(w2_FD.t(), hidden.to(x.dtype), dtype=y.dtype)
    x = y.to(x.dtype)
    return x, normalize(x, norm)


def can_draw(params, state):
    """Whether sample_next below draws with these SamplingParams."""
    known = (params.temperature, params.top_k, params.top_p) == params.for_sample()
    return (known and [field.name for field in fields(params)] == KNOWN
            and from_few(params.for_sample(), state.seen.shape[1]))


def from_few(settings, vocab_size):
    """Whether sampling.sample's settings ask for the likeliest token, or one of the top k."""
    return (len(settings) == 3 and 0 < chosen(*settings) <= MOST_CHOSEN
            and 2 * chosen(*settings) * PART <= vocab_size)


def chosen(temperature, top_k, top_p):
    """How many of the likeliest tokens the draw is from; 0: all."""
    return 1 if temperature < GREEDY_BELOW else top_k


def sample_next(state, logits, params):
    """Draw the next token of every row from its logits (B, V) into state.token."""
    logits = logits[:, : state.seen.shape[1]].float()
    penalty = params.repetition_penalty
    damped = torch.where(logits > 0, logits / penalty, logits * penalty)
    top_Bk, id_Bk = torch.where(state.seen, damped, logits).topk(chosen(*params.for_sample()))
    p_Bk = (top_Bk / max(params.temperature, GREEDY_BELOW)).softmax(1)
    if params.top_p < 1:
        p_Bk = p_Bk * (p_Bk.cumsum(1) - p_Bk < params.top_p)
    u_B1 = state.u[:, state.step]
    uniform_Bk = (mix(mix(id_Bk + 1) ^ (u_B1 * 2**24).long()) + 0.5) * TO_UNIT
    place_B1 = (-torch.log1p(-uniform_Bk) / p_Bk).argmin(1, keepdim=True)
    state.token.copy_(id_Bk.gather(1, place_B1))
    if penalty != 1:
        state.seen.scatter_(1, state.token, True)
    state.step += 1


def mix(x):
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def weight_and_bias(layer):
    return (layer, None) if isinstance(layer, torch.Tensor) else (layer.weight, layer.bias)


def wide(x):
    """x in float32, or in float64 where it is already."""
    return x if x.dtype == torch.float64 else x.float()
