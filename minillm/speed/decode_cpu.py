"""Decoding at batch size 1 on a CPU: what the model's modules compute, as operations on vectors.

A token takes at least as long as reading the weights; the modules' many small operations come on
top of that, and vectors need fewer of them.
"""
import torch
from torch.nn import functional as F

from minillm import generation
from minillm.attention import apply_rope


def decode_one_token(model, cache, token, position, end):
    """Fast version of generation.decode_one_token: at batch size 1 it computes with vectors.

    1.1 times the tokens/s in bfloat16 (Xeon, two cores, `python -m bench.decode --device=cpu`).
    """
    if len(token) > 1:
        return generation.decode_one_token(model, cache, token, position, end)
    return decode_vector(model, cache, token.item(), end - 1)


def decode_vector(model, cache, token, position):
    """token, position: int. Returns the logits (1, V) of the token after it."""
    x = model.wte.weight[token]
    rope = model.rope[:, position, None]
    for block, keys, values in zip(model.blocks, cache.k, cache.v):
        attn, ffn = block.attn, block.ffn
        n_kv, hd = attn.n_kv_head, attn.head_dim
        qkv = linear(attn.qkv, rms_norm(block.attn_norm, x)).view(-1, hd)
        qk = apply_rope(qkv[:-n_kv], rope)
        keys[0, :, position] = qk[attn.n_head:]
        values[0, :, position] = qkv[-n_kv:]
        # the heads of a group are the rows of one query matrix, as in cached_attention
        q = qk[: attn.n_head].view(1, n_kv, -1, hd)
        seen = slice(0, position + 1)
        y = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen])
        x = x + linear(attn.proj, y.view(-1))
        row = rms_norm(block.ffn_norm, x)
        if hasattr(ffn, "router"):
            x = x + moe(ffn, row)
        else:
            x = x + linear(ffn.down, F.silu(linear(ffn.up, row)))
    return torch.mv(model.wte.weight, rms_norm(model.norm, x))[None]


def moe(layer, x_D):
    """The chosen experts one after the other, each two matrix-vector products."""
    gate_1K, expert_1K = layer.router(x_D[None])
    y_D = 0
    for gate, expert in zip(gate_1K[0].tolist(), expert_1K[0].tolist()):
        h_F = F.silu(torch.mv(layer.w1_EDF[expert].t(), x_D)) * gate
        y_D = y_D + torch.mv(layer.w2_EFD[expert].t(), h_F)
    return y_D


def linear(layer, x):
    """The linear layer of a vector: mv reads bfloat16 weights 1.3 times as fast as F.linear."""
    y = torch.mv(layer.weight, x)
    if layer.bias is not None:
        y = y + layer.bias
    return y


def rms_norm(norm, x):
    """RMSNorm of a vector; F.rms_norm takes six passes on a CPU."""
    row = x.float()
    scale = (row.dot(row).item() / len(x) + norm.eps) ** -0.5
    return (row * norm.weight).mul_(scale).to(x.dtype)
