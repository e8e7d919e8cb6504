"""Decoding on a CPU, beside the limit that reading the weights sets: `python -m bench.train decode --device=cpu`.

Making one token reads every weight once, and little else. So the limit is a bare loop of matrix-vector
products over the same weights, each times a vector once a token. Loop and answers alternate in one run,
so that whatever else the machine does slows both; the figures are medians.
"""
import statistics
import time
from dataclasses import fields

import torch

from minillm.device import describe, pick_dtype
from model import GPT, GPTConfig
from moe import MoE


def matrices(model):
    """The matrices, as (rows, columns), that one token is multiplied with; of the experts as many as it visits."""
    found = [parameter for name, parameter in model.named_parameters() if parameter.dim() == 2 and "router" not in name]
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        found += [w[e].t() for e in range(layer.k) for w in (layer.w1_EDF, layer.w2_EFD)]
    return found


@torch.inference_mode()
def matvec_loop(pairs, tokens):
    """Seconds a token of the bare loop."""
    start = time.perf_counter()
    for _ in range(tokens):
        for w, x in pairs:
            torch.mv(w, x)
    return (time.perf_counter() - start) / tokens


def answer(model, prompts, new_tokens):
    """(seconds to the first token, seconds a step after it) of one answer."""
    cache = model.new_cache(len(prompts))
    marks = [time.perf_counter()]
    for _ in model.generate(prompts, new_tokens, temperature=0.8, top_k=50, cache=cache):
        marks.append(time.perf_counter())
    return marks[1] - marks[0], (marks[-1] - marks[1]) / max(len(marks) - 2, 1)


def bench_decode_cpu(s):
    """Print speed and limit for settings `s` of bench.py, for float32 and bfloat16 unless --dtype names one."""
    dtypes = {name: pick_dtype(name, torch.device("cpu")) for name in (("float32", "bfloat16") if s.dtype == "auto" else (s.dtype,))}
    batch, new_tokens = s.batch_size or 1, s.new_tokens if "new_tokens" in s.given else 64
    config = GPTConfig(**{f.name: getattr(s, f.name) for f in fields(GPTConfig) if hasattr(s, f.name)} | {"block_size": s.prompt + new_tokens + 1})
    torch.manual_seed(0)
    model = GPT(config)
    total, active = model.n_params()
    prompts = torch.randint(1, s.vocab_size, (batch, s.prompt)).tolist()
    print(f"{describe(torch.device('cpu'))} · {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active · batch {batch} · prompt {s.prompt}, {new_tokens} new")
    for name, dtype in dtypes.items():
        model.for_generation(torch.device("cpu"), dtype)
        pairs = [(w, torch.randn(w.shape[1]).to(w.dtype)) for w in matrices(model)]
        size = sum(w.nbytes for w, _ in pairs)
        matvec_loop(pairs, 2), answer(model, prompts, 3)
        rounds = [(matvec_loop(pairs, new_tokens // 2 + 1), *answer(model, prompts, new_tokens)) for _ in range(max(s.repeats // 4, 3))]
        loop, first, step = (statistics.median(column) for column in zip(*rounds))
        print(f"{name:<9} {batch / step:6.1f} tokens/s   {step * 1e3:6.2f} ms a step, first token after {first * 1e3:.0f} ms   "
              f"limit {batch / loop:6.1f} tokens/s ({size / loop / 1e9:.1f} GB/s)   {loop / step:.1%} of the limit")
