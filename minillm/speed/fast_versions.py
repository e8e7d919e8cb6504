"""Which plain function each fast version replaces, and on which device. For model.py and serve.py.

Delete minillm/speed and everything still runs, slower, with the same numbers up to rounding. One
that no longer computes what its plain function does, because that was changed, is left out:
agreement.py.
"""
from functools import partial

import torch
import torch.nn as nn

from minillm.distributed import print0
from minillm.errors import UserError
from minillm.generation import KVCache, decode_loop, decode_one_token
from minillm.sampling import sample
from minillm.speed import cuda_graph, decode_cpu, decode_gpu, decode_ops
from minillm.speed.agreement import (agrees, chooses_experts, decodes, draws, has_the_loss, insist,
                                     multiplies_experts)
from minillm.speed.cross_entropy import linear_cross_entropy
from minillm.speed.float8 import Float8Linear
from minillm.speed.float8_experts import float8_experts
from minillm.speed.grouped_mm import (all_experts, generating_experts, grouped_experts,
                                      lay_out_for_decoding)
from minillm.speed.linear import Linear
from minillm.speed.topk import top_experts, topk_by_parts


def use_for_training(model, compiled):
    """Swap in the fast versions for training, before compiling. Parameters keep their names."""
    on_gpu = model.wte.weight.is_cuda
    for module in model.modules():
        if on_gpu and type(module) is nn.Linear:
            module.__class__ = Linear
    if model.config.n_expert:
        use_experts(model, grouped_experts)
    if on_gpu and compiled:
        cross_entropy = partial(linear_cross_entropy, plain=model.cross_entropy)
        if agrees(model, "minillm/speed/cross_entropy.py", has_the_loss, cross_entropy):
            model.cross_entropy = cross_entropy


def use_float8(model, device, dtype, tokens):
    """Let `model` train in 8 bits, `tokens` at a time, on a loss that is their mean or near it.

    Call it after use_for_training. Raises UserError where it can't.
    """
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"--fp8=True needs --dtype=bfloat16, not {name}")
    if device.type == "cuda":
        check_float8_gpu(device, model.config.n_expert)
    elif device.type == "cpu":
        print0("fp8=True makes training on a CPU many times slower: it is for a GPU")
    if tokens % 16:
        raise UserError(f"--fp8=True needs multiples of 16: batch_size * block_size is {tokens}")
    # type: a class that somebody derived from nn.Linear computes something of its own
    layers = [layer for layer in model.blocks.modules() if type(layer) in (nn.Linear, Linear)]
    widths = {size for layer in layers for size in layer.weight.shape} | {model.config.n_inner}
    for width in sorted(widths):
        if width % 16:
            raise UserError(f"--fp8=True needs multiples of 16: a layer is {width} wide")
    if model.config.n_expert:
        # 8 bits err by a few percent
        insist(model, "minillm/speed/float8_experts.py", multiplies_experts, float8_experts, 0.2,
               advice="leave --fp8 out")
        for _, moe in model.moe_layers():
            moe.experts = float8_experts
    for layer in layers:
        layer.__class__ = Float8Linear               # names and weights stay, and so do checkpoints


def check_float8_gpu(device, n_expert):
    """Raise UserError for a GPU without 8-bit matmuls; those of experts need a newer one."""
    name = torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise UserError(f"{name} has no 8-bit matmuls: leave --fp8 out")
    if n_expert and capability[0] not in (9, 10):
        raise UserError(f"{name} has no 8-bit matmuls for experts: leave --fp8 out")


def use_for_generation(model):
    """Swap in what is faster in a model that is only used: experts, and their weights' layout."""
    if model.wte.weight.is_cpu:
        decodes_on_cpu(model)                        # says now, not in an answer, if it does not
    if model.config.n_expert and use_experts(model, generating_experts):
        for _, moe in model.moe_layers():
            if moe.w1_EDF.is_cuda or moe.w1_EDF.element_size() < 4:
                lay_out_for_decoding(moe)


def use_experts(model, experts):
    """Swap in the experts' product and their choice; other devices (mps) lack the kernel.

    Returns whether the product was.
    """
    device = model.wte.weight.device.type
    fast_product = device in ("cpu", "cuda") and all(
        agrees(model, f"{function.__name__} of minillm/speed/grouped_mm.py", multiplies_experts,
               function) for function in (grouped_experts, all_experts))
    fast_choice = device == "cuda" and agrees(
        model, "top_experts of minillm/speed/topk.py", chooses_experts, top_experts)
    for _, moe in model.moe_layers():
        if fast_product:
            moe.experts = experts
        if fast_choice:
            moe.router.top_experts = top_experts
    return fast_product


def decodes_on_cpu(model):
    """Whether decode_cpu.py computes what this model does."""
    return agrees(model, "minillm/speed/decode_cpu.py", decodes, decode_cpu.decode_one_token,
                  KVCache)


def decodes_compiled(model):
    """Whether decode_ops.py, and with it the Triton kernels, computes what this model does."""
    step = partial(decode_gpu.decode_one_token, decode_ops)
    return agrees(model, "minillm/speed/decode_ops.py", decodes, step, KVCache, 2)


def draws_compiled(model):
    """Whether its sample_next, and with it draw_kernels.py, draws as sampling.py does."""
    return agrees(model, "sample_next of minillm/speed/decode_ops.py", draws,
                  decode_ops.sample_next)


def generate_arguments(model, compile):
    """The arguments of generation.generate that are faster on the model's device."""
    device = model.wte.weight.device.type
    if device == "cuda":
        compile = compile and decodes_compiled(model)
        graph = partial(cuda_graph.decode_graph, compile=compile,
                        draws=compile and draws_compiled(model))
        return {"forward": cuda_graph.forward, "decode": graph}
    if device == "cpu":
        token = decode_cpu.decode_one_token if decodes_on_cpu(model) else decode_one_token
        return {"decode": partial(decode_loop, decode_one_token=token, topk=topk_by_parts)}
    return {}


def for_batch_decoder(model, rows, compile=False):
    """The arguments of BatchDecoder over `rows` rows that are faster on the model's device."""
    device = model.wte.weight.device.type
    if device == "cuda":
        compile = compile and decodes_compiled(model)
        span = partial(cuda_graph.power_of_two_rows, rows=rows)
        return {"read": partial(cuda_graph.read_row, staging=cuda_graph.GraphCache(model)),
                "decode": partial(cuda_graph.decode_rows, compile=compile), "span": span,
                "sample": cuda_graph.RecordedSample(rows, compile and draws_compiled(model))}
    if device == "cpu":
        token = decode_cpu.decode_one_token if decodes_on_cpu(model) else decode_one_token
        return {"decode": token, "sample": partial(sample, topk=topk_by_parts)}
    return {}


def cache_type(model):
    """The KVCache that generate_arguments' functions need."""
    return cuda_graph.GraphCache if model.wte.weight.is_cuda else KVCache
