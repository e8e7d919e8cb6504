"""Decoding on a GPU in few kernels: of a single row five per layer, of several seven.

`ops` are the functions that compute: decode_kernels.py, in Triton, or decode_ops.py, the same in
plain torch, to be read first. One row makes 4,542 tokens/s at 171M and 64 rows 135,925, in a CUDA
graph (H200, `python -m bench.decode`, with `--batch_size=64`).
"""
import torch

from minillm.generation import sample_next
from minillm.speed.decode_ops import can_draw
from minillm.speed.topk import topk_by_parts


def decode_one_token(ops, model, cache, token, position, end=None):
    """Fast version of generation.decode_one_token. end: not used."""
    return run_layers(ops, model, cache, model.wte.weight[token[:, 0]], position[:, 0])


def decode_step(ops, draw, model, cache, state, params):
    """Fast version of generation.decode_step. draw: draw_kernels.sample_next, or None."""
    x, position = ops.embed(model, state, cache.size)
    logits = run_layers(ops, model, cache, x, position)
    if draw and can_draw(params, state):
        draw(state, logits, params)
    else:
        sample_next(state, logits, params, topk_by_parts)


def run_layers(ops, model, cache, x, position):
    """x: (B, D), the tokens' embeddings; position: (B,). Returns the logits (B, V), float32.

    v: x after the norm that reads it next, in whichever form `ops` keep it.
    """
    norms = [block.attn_norm for block in model.blocks] + [model.norm]
    v = ops.normalize(x, norms[0])
    for block, next_norm, keys, values in zip(model.blocks, norms[1:], cache.k, cache.v):
        attn, ffn = block.attn, block.ffn
        y = ops.attend(ops.linear(attn.qkv, v), keys, values, model.rope, position, cache.size)
        x, v = ops.add(attn.proj, y, x, block.ffn_norm)
        if hasattr(ffn, "router"):
            x, v = ops.add_experts(ffn, v, x, next_norm)
        else:
            x, v = ops.add(ffn.down, ops.linear(ffn.up, v, silu=True), x, next_norm)
    return ops.linear(model.wte.weight, v, dtype=torch.float32)
