"""Training on several processes: the model in compiled parts, and DDP sends gradients in between.

A model compiled as a whole has a single backward pass, and DDP would send all gradients at its end.
torch's own answer cuts the graph at every bucket and compiles each piece by itself; with
flex_attention the first step of config/sft.py then came after 85 s (two H200, torch 2.11, nothing
cached). Parts of the same shape are compiled once: 44 s, since all blocks share one. Parts of four
blocks take longer to compile, and only the MoE on four GPUs is faster with them (1.7%).
"""
from functools import partial

import torch

from minillm.device import compile_for_training
from minillm.speed.agreement import insist, runs_the_blocks


def compile_in_parts(model, device):
    """Compile the embedding, each block, the last norm and the loss, each by itself.

    The model itself stays an ordinary module, and DDP goes around it.
    """
    def plain_parts(copy, *arguments):
        return trunk(copy, copy.embed, run_block, copy.norm, *arguments)
    insist(model, "minillm/speed/parts.py", runs_the_blocks, plain_parts,
           advice="leave --compile out")
    # without this, torch would look for a place to cut in each of them
    torch._dynamo.config.optimize_ddp = False
    parts = [compile_for_training(part, device) for part in (model.embed, run_block, model.norm)]
    model.trunk = partial(trunk, model, *parts)
    model.cross_entropy = compile_for_training(model.cross_entropy, device)


def trunk(model, embed, run_block, norm, idx, rope, attend):
    """Fast version of GPT.trunk for training, where attention does not depend on the layer."""
    x = embed(idx)
    attend = partial(attend, layer=None)
    stats = []
    for block in model.blocks:
        x, stat = run_block(block, x, rope, attend)
        stats.append(stat)
    return norm(x), model.over_layers(stats)


def run_block(block, x, rope, attend):
    return block(x, rope, attend)
