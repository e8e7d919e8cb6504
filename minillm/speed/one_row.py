"""Decoding a single row: what model.py's blocks compute, written for one token at a time.

There a token takes as long as reading the weights at best, and what surrounds the products comes on top. On a CPU vectors
take less of that than the modules do, and on a GPU a compiler makes six kernels a layer of what fused.py offers.
"""
import math

import torch
from torch.nn import functional as F

from minillm.speed.fused import in_memory, product, products
from moe import MoE
from minillm.attention import apply_rope


def decode_one_row(model, cache, token, position):
    """decode_one_token of a single row on a CPU, in vectors: fewer operations and no calls of modules, for 1.09 times the tokens
    a second. token, position: int. Returns logits (1, V)."""
    x, rope = model.wte.weight[token], model.rope[:, position, None]
    for block, k, v in zip(model.blocks, cache.k, cache.v):
        attn, ffn = block.attn, block.ffn
        qkv = of_row(attn.qkv, norm_of_row(block.attn_norm, x)).view(-1, attn.head_width)
        qk = apply_rope(qkv[: -attn.n_kv_head], rope)
        k[0, :, position], v[0, :, position] = qk[attn.n_head:], qkv[-attn.n_kv_head:]
        # the heads of a group are the rows of one query matrix, as in attend_cache
        y = F.scaled_dot_product_attention(qk[: attn.n_head].view(1, attn.n_kv_head, -1, attn.head_width), k[:, :, : position + 1], v[:, :, : position + 1])
        x = x + of_row(attn.proj, y.view(-1))
        row = norm_of_row(block.ffn_norm, x)
        x = x + (ffn.one_row(row) if isinstance(ffn, MoE) else of_row(ffn.down, F.silu(of_row(ffn.up, row))))
    return torch.mv(model.wte.weight, norm_of_row(model.norm, x))[None]


def of_row(linear, x):
    """The linear layer of a vector: mv reads bfloat16 weights 1.3 times as fast as F.linear does."""
    y = torch.mv(linear.weight, x)
    return y if linear.bias is None else y + linear.bias


def norm_of_row(norm, x):
    """RMSNorm of a vector; F.rms_norm takes six passes on a CPU."""
    wide = x.float()
    return (wide * norm.weight).mul_((wide.dot(wide).item() / len(x) + 1e-6) ** -0.5).to(x.dtype)


def decode_one_row_compiled(model, cache, token, position):
    """decode_one_token of a single row for a compiler on a GPU: fused.py says how it is written, and why. token, position:
    (1, 1). Returns logits (1, V), float32. Six kernels a layer, with a mixture nine."""
    c, dtype = model.config, model.wte.weight.dtype
    n, group, head_width = c.n_kv_head, c.n_head // c.n_kv_head, c.n_embd // c.n_head
    position, x = position[0], in_memory(model.wte.weight[token[0]][0])
    cos, sin = rope = in_memory(model.rope[:, position.clamp(max=cache.size - 1)])
    slot = torch.arange(cache.keys.shape[3], device=x.device)
    here, visible = slot == position, slot <= position
    new = []                                     # q, k and v of each layer, before RoPE

    def linear(layer, x, norm=None):
        y = product(layer.weight, x, norm)
        return y if layer.bias is None else y + layer.bias
    for block, keys, values in zip(model.blocks, cache.keys.unbind(), cache.values.unbind()):
        attn, ffn = block.attn, block.ffn
        new.append(in_memory(linear(attn.qkv, x, block.attn_norm).to(dtype).view(-1, head_width)))
        q, new_k, new_v = new[-1].float().split((c.n_head, n, n))
        # The new token's k and v stand beside the cache, where `here` says, and are written to it at the end, all layers at once.
        # RoPE turns q and the new k alike, so their product needs none.
        (q_a, q_b), (k_a, k_b), (new_a, new_b) = (t.chunk(2, -1) for t in (q.view(n, group, 1, head_width), keys[0].float(), new_k[:, None]))
        turned_a, turned_b = q_a * cos - q_b * sin, q_a * sin + q_b * cos
        v, y = values[0].transpose(1, 2).float(), 0                                # (n_kv_head, head width, slots)
        for g in range(group):                   # the queries of a group one by one: (n_kv_head, slots)
            terms = torch.where(here[:, None], q_a[:, g] * new_a + q_b[:, g] * new_b, turned_a[:, g] * k_a + turned_b[:, g] * k_b)
            score = in_memory(torch.where(visible, terms.sum(-1) * (math.log2(math.e) * head_width ** -0.5), float("-inf")))
            # Each channel of v works out the softmax by itself, sooner than it would be told. `v - v`, which is 0,
            # makes the softmax's sums run along v's rows, and the compiler hold them in registers as it does v.
            score = score[:, None] + (v - v)
            weight = (score - score.amax(-1, keepdim=True)).exp2()
            attended = (torch.where(here, new_v[:, :, None], v) * weight).sum(-1) / weight.sum(-1)
            y = y + products(attn.proj.weight.unflatten(1, (n, group, -1))[:, :, g].flatten(1), in_memory(attended.to(dtype).flatten()))
        y = y.sum(-1) if attn.proj.bias is None else y.sum(-1) + attn.proj.bias
        x = in_memory((x + y).to(dtype))
        if isinstance(ffn, MoE):
            y = ffn.one_row_compiled(in_memory(block.ffn_norm(x)))
        else:
            y = linear(ffn.down, in_memory(F.silu(linear(ffn.up, x, block.ffn_norm)).to(dtype)))
        x = in_memory((x + y).to(dtype))
    new = torch.stack(new)[:, None, :, None]                                       # (n_layer, 1, heads, 1, head width)
    cache.keys[:, :, :, position] = apply_rope(new[:, :, c.n_head: -n], rope[:, :, None])
    cache.values[:, :, :, position] = new[:, :, -n:]
    return in_memory(product(model.wte.weight, x, model.norm))[None]
