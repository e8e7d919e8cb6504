"""Which plain function each fast version replaces, and on which device. For model.py and serve.py.

Delete minillm/speed and everything still runs, slower, with the same numbers.
"""
from functools import partial

import torch
import torch.nn as nn

from minillm.errors import UserError
from minillm.generation import KVCache, decode_loop
from minillm.sampling import sample
from minillm.speed import cuda_graph, decode_cpu
from minillm.speed.cross_entropy import linear_cross_entropy
from minillm.speed.float8 import Float8Linear
from minillm.speed.float8_experts import float8_experts
from minillm.speed.grouped_mm import generating_experts, grouped_experts, lay_out_for_decoding
from minillm.speed.linear import Linear
from minillm.speed.topk import top_experts, topk_by_parts


def use_for_training(model, compiled):
    """Swap in what is faster in training, before compiling. The parameters keep their names."""
    on_gpu = model.wte.weight.is_cuda
    for module in model.modules():
        if on_gpu and type(module) is nn.Linear:
            module.__class__ = Linear
    if model.config.n_expert:
        use_experts(model, grouped_experts)
    if on_gpu and compiled:
        model.cross_entropy = partial(linear_cross_entropy, plain=model.cross_entropy)


def use_float8(model, device, dtype, tokens):
    """Let `model` train in 8 bits, `tokens` at a time, on a loss that is their mean or near it.

    Call it after use_for_training. Raises UserError where it can't.
    """
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"--fp8=True needs --dtype=bfloat16, not {name}")
    if device.type == "cuda":
        check_float8_gpu(device, model.config.n_expert)
    if tokens % 16:
        raise UserError(f"--fp8=True needs multiples of 16: batch_size * block_size is {tokens}")
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    widths = {size for layer in layers for size in layer.weight.shape} | {model.config.n_inner}
    for width in sorted(widths):
        if width % 16:
            raise UserError(f"--fp8=True needs multiples of 16: a layer is {width} wide")
    for layer in layers:
        layer.__class__ = Float8Linear               # names and weights stay, and so do checkpoints
    if model.config.n_expert:
        for block in model.blocks:
            block.ffn.experts = float8_experts


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
    if not model.config.n_expert:
        return
    use_experts(model, generating_experts)
    weight = model.blocks[0].ffn.w1_EDF
    if weight.is_cuda or weight.element_size() < 4:
        for block in model.blocks:
            lay_out_for_decoding(block.ffn)


def use_experts(model, experts):
    """Swap in the experts' product and their choice; other devices (mps) lack the kernel."""
    device = model.wte.weight.device.type
    for block in model.blocks:
        if device in ("cpu", "cuda"):
            block.ffn.experts = experts
        if device == "cuda":
            block.ffn.router.top_experts = top_experts


def generate_arguments(model, compile):
    """The arguments of generation.generate that are faster on the model's device."""
    device = model.wte.weight.device.type
    if device == "cuda":
        graph = partial(cuda_graph.decode_graph, compile=compile)
        return {"forward": cuda_graph.forward, "decode": graph}
    if device == "cpu":
        token = decode_cpu.decode_one_token
        return {"decode": partial(decode_loop, decode_one_token=token, topk=topk_by_parts)}
    return {}


def for_batch_decoder(model, rows, compile=False):
    """The arguments of BatchDecoder over `rows` rows that are faster on the model's device."""
    device = model.wte.weight.device.type
    if device == "cuda":
        # compiled: always all rows, so that there is one graph to compile
        fewest = rows if compile else 1
        span = partial(cuda_graph.power_of_two_rows, rows=rows, fewest=fewest)
        return {"read": partial(cuda_graph.read_row, staging=cuda_graph.GraphCache(model)),
                "decode": partial(cuda_graph.decode_rows, compile=compile), "span": span,
                "sample": cuda_graph.RecordedSample(rows)}
    if device == "cpu":
        return {"decode": decode_cpu.decode_one_token,
                "sample": partial(sample, topk=topk_by_parts)}
    return {}


def cache_type(model):
    """The KVCache that generate_arguments' functions need."""
    if model.wte.weight.is_cuda:
        return cuda_graph.GraphCache
    return KVCache
