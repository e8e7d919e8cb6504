"""Speed of decoding with the KV cache, beside the limit that reading the weights sets.

    python -m bench.decode                             # the 171M model, batch size 1
    python -m bench.decode --batch_size=64
    python -m bench.decode --n_expert=8                # the 876M MoE
    python -m bench.decode --device=cpu                # float32 and bfloat16 in turns

Making one token reads every weight once, and little else. On a GPU the limit is that many bytes at
the speed of a large copy. On a CPU it is a bare loop of matrix-vector products over the same
weights; loop and answers take turns, so that whatever else the machine does slows both. Figures are
medians.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import statistics
import time
from dataclasses import dataclass

import torch

from bench.measure import (ModelShape, copy_ceiling, make_model, median_time, print_headline,
                           print_profile, seconds_of)
from minillm.configurator import NonNegative, Positive, configure, whole
from minillm.device import pick_device, pick_dtype
from minillm.errors import run
from moe import MoE


@dataclass
class Settings(ModelShape):
    # the answers
    batch_size: Positive = 1          # prompts
    prompt: Positive = 64             # tokens of each prompt
    new_tokens: NonNegative = 0       # tokens made for each; 0: 256, or 64 on a CPU
    # the measurement
    repeats: whole(2) = 20            # a GPU times half as many answers, a CPU a quarter
    profile: bool = False             # print where the GPU's time goes
    # the machine
    device: str = "auto"              # auto, cpu, cuda
    dtype: str = "auto"               # of a CPU: float32 or bfloat16; auto: both. A GPU: bfloat16
    compile: bool = True              # Triton kernels, on a GPU


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    if device.type == "cuda":
        decode_on_gpu(s, device)
    else:
        decode_on_cpu(s, device)


def random_prompts(s):
    return torch.randint(1, s.vocab_size, (s.batch_size, s.prompt)).tolist()


def decode_on_gpu(s, device):
    torch.backends.cuda.matmul.allow_tf32 = True
    new_tokens = s.new_tokens or 256
    copy = copy_ceiling(device)
    model = make_model(s, s.prompt + new_tokens + 1, device).for_generation(device, torch.bfloat16)
    cache = model.new_cache(s.batch_size)
    prompts = random_prompts(s)

    def answer():
        cache.tokens = [[] for _ in prompts]             # nothing of the prompts is computed yet
        rows = model.generate(prompts, new_tokens, top_k=20, cache=cache, compile=s.compile)
        assert sum(1 for _ in rows) == new_tokens

    print_headline(model, device, f"batch {s.batch_size}", f"prompt {s.prompt}, {new_tokens} new",
                   "bfloat16", f"compile={s.compile}")
    first = seconds_of(answer, device)
    print(f"first answer  {first:8.1f} s, with recording the graph and compiling")
    seconds = median_time(answer, s.repeats // 2, device, warmup=1)

    total, active = model.n_params()
    read = 2 * (active if s.batch_size == 1 else total)  # bytes of a step
    step, limit = seconds / new_tokens, read / copy
    print(f"tokens/s      {s.batch_size / step:8,.0f}   prompt and sampling included")
    print(f"per step      {step * 1e6:8.0f} µs   reading the weights once at "
          f"{copy / 1e12:.2f} TB/s: {limit * 1e6:.0f} µs, {limit / step:.1%} of that bound")
    if s.profile:
        print_profile(answer, new_tokens, "µs per token")


def decode_on_cpu(s, device):
    names = ["float32", "bfloat16"] if s.dtype == "auto" else [s.dtype]
    dtypes = {name: pick_dtype(name, device) for name in names}
    new_tokens = s.new_tokens or 64
    model = make_model(s, s.prompt + new_tokens + 1, device)
    prompts = random_prompts(s)
    print_headline(model, device, f"batch {s.batch_size}", f"prompt {s.prompt}, {new_tokens} new")
    for name, dtype in dtypes.items():
        model.for_generation(device, dtype)
        weights = matrices(model)
        vectors = [torch.randn(w.shape[1]).to(w.dtype) for w in weights]
        matvec_loop(weights, vectors, 2)                 # warm-up
        answer(model, prompts, 3)
        rounds = []
        for _ in range(max(s.repeats // 4, 3)):
            loop = matvec_loop(weights, vectors, new_tokens // 2 + 1)
            rounds.append((loop, *answer(model, prompts, new_tokens)))
        loop, first, step = (statistics.median(column) for column in zip(*rounds))
        speed = sum(w.nbytes for w in weights) / loop
        print(f"{name:<9} {s.batch_size / step:6.1f} tokens/s   {step * 1e3:6.2f} ms per step, "
              f"first token after {first * 1e3:.0f} ms   limit {s.batch_size / loop:6.1f} tokens/s "
              f"({speed / 1e9:.1f} GB/s)   {loop / step:.1%} of the limit")


def matrices(model):
    """The matrices, (rows, columns), that one token is multiplied with; of its experts' too."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "router" not in name:
            found.append(parameter)
    for module in model.modules():
        if isinstance(module, MoE):
            for expert in range(module.k):
                found += [module.w1_EDF[expert].t(), module.w2_EFD[expert].t()]
    return found


@torch.inference_mode()
def matvec_loop(weights, vectors, tokens):
    """Seconds per token of the bare loop."""
    start = time.perf_counter()
    for _ in range(tokens):
        for w, x in zip(weights, vectors):
            torch.mv(w, x)
    return (time.perf_counter() - start) / tokens


def answer(model, prompts, new_tokens):
    """(seconds to the first token, seconds per step after it) of one answer."""
    cache = model.new_cache(len(prompts))
    marks = [time.perf_counter()]
    for _ in model.generate(prompts, new_tokens, temperature=0.8, top_k=50, cache=cache):
        marks.append(time.perf_counter())
    return marks[1] - marks[0], (marks[-1] - marks[1]) / max(len(marks) - 2, 1)


if __name__ == "__main__":
    run(main)
