"""Measured speed, each number beside the limit that this machine sets, both from the same run.

    python -m bench.train train                       # a full training step of the 171 M model (needs a GPU)
    python -m bench.train train --n_expert=8          # the 876 M mixture of experts
    python -m bench.train train --data_dir=data/pretrain   # from token files as well: does the GPU wait for them?
    python -m bench.train train --device=cpu          # the demo's model on this CPU
    python -m bench.train decode --batch_size=1       # tokens a second with the KV cache
    python -m bench.train data                        # preparation against a bare tokenizer loop

A training step is forward, backward, clipping and AdamW on random tokens; times are medians after
warm-up. FLOPs per token: 6 × active matmul parameters (the tied head once) + 6 · n_layer · T · n_embd.
"""
import itertools
import statistics
import time
from dataclasses import dataclass, fields

import torch

from minillm.attention import document_mask
from minillm.configurator import configure, positional
from minillm.errors import UserError, run
from minillm.dataloader import TokenData, batch_windows
from minillm.device import autocast, compile_for_training, describe, peak_flops, pick_device, pick_dtype, to_device
from minillm.speed.float8 import use_float8
from model import GPT, GPTConfig


@dataclass
class Settings:
    what: list[str] = positional()    # train, decode or data; behind data perhaps a file of text and one of conversations
    n_layer: int = 12                 # blocks
    n_head: int = 16                  # query heads
    n_kv_head: int = 8                # key/value heads
    n_embd: int = 1024                # width
    n_inner: int = 0                  # width of the FFN or of one expert; 0: 4 * n_embd
    n_expert: int = 0                 # experts per layer; 0: dense
    vocab_size: int = 32000           # vocabulary
    batch_size: int = 0               # rows; 0: 64 for train (16 on a CPU), 1 for decode
    block_size: int = 512             # tokens in a row (train)
    prompt: int = 64                  # tokens of the prompt (decode)
    new_tokens: int = 256             # tokens made (decode)
    doc_mask: bool = False            # attention inside documents, as in SFT (train)
    data_dir: str = ""                # token files to train on as well, to see whether the GPU waits for them (train)
    repeats: int = 20                 # timed steps
    profile: bool = False             # print where the GPU's time goes
    device: str = "auto"              # auto, cpu, cuda
    dtype: str = "auto"               # auto, float32, bfloat16
    compile: bool = True              # torch.compile
    fp8: bool = False                 # products of the dense model's blocks in 8 bits (train)


def median_time(function, repeats, device, warmup=5):
    """Median seconds of `function` after `warmup` calls.

    On a GPU the calls follow one another without waiting, as train.py's steps do, and an event marks
    the end of each.
    """
    clock = time.perf_counter
    marks = []
    for i in range(warmup + repeats + 1):
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(clock())
        if i < warmup + repeats:
            function()
    _wait(device)
    pairs = list(zip(marks, marks[1:]))[warmup:]
    return statistics.median(a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a for a, b in pairs)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceilings(device, dtype):
    """(FLOP/s of a large matrix product, bytes/s of a large copy, read + written), on random data."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matmul = 2 * n**3 / median_time(lambda: a @ b, 20 if device.type == "cuda" else 5, device)
    source = torch.randn((1 << 30) if device.type == "cuda" else (1 << 26), device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_time(lambda: target.copy_(source), 10, device)
    return matmul, copy


def make_model(s, device, block_size):
    config = GPTConfig(**{f.name: getattr(s, f.name) for f in fields(GPTConfig) if hasattr(s, f.name)} | {"block_size": block_size})
    torch.manual_seed(0)
    with device:
        return GPT(config)


def random_batches(s, device):
    """x, y on the device, over and over the same four."""
    batches = [torch.randint(1, s.vocab_size, (s.batch_size, s.block_size + 1), device=device) for _ in range(4)]
    for batch in batches if s.doc_mask else []:
        batch[torch.rand(batch.shape, device=device) < 1 / 100] = 0           # documents of 100 tokens on average
    return itertools.cycle([(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in batches])


def file_batches(s, device):
    """x, y of train.bin in the order in which train.py reads them, on their way to the device."""
    data = TokenData(s.data_dir, "train", s.block_size)
    if data.meta["vocab_size"] > s.vocab_size:
        raise UserError(f"{s.data_dir} has a vocabulary of {data.meta['vocab_size']:,}: give --vocab_size={data.meta['vocab_size']}")
    return (to_device(data.windows(batch_windows(0, step, s.batch_size, data.n_windows)), device) for step in itertools.count())


def training_step(s, model, device, dtype):
    """A function that makes one full training step of a batch (x, y), as train.py does: the host is one step ahead of the device."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step_model = compile_for_training(model, device) if s.compile else model
    ends = []

    def step(batch):
        x, y = batch
        with autocast(device, dtype):
            loss, moe = step_model(x, y, document_mask(x, flex=s.compile and device.type == "cuda") if s.doc_mask else None)
        objective = loss / y.numel()
        if moe:
            objective = objective + 0.05 * moe[0]
        objective.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.grad_scale, optimizer.found_inf = norm.clamp(min=1), (~norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            ends.append(torch.cuda.Event())
            ends[-1].record()
            if len(ends) > 1:
                ends.pop(0).synchronize()
    return step


def bench_train(s):
    device = pick_device(s.device)
    if device.type == "cpu":
        # the demo's model unless told otherwise, since nobody trains 171 M parameters on two cores
        demo = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=192, vocab_size=1200, block_size=128)
        vars(s).update((key, value) for key, value in demo.items() if key not in s.given)
    dtype = pick_dtype(s.dtype, device)
    s.batch_size = s.batch_size or (64 if device.type == "cuda" else 16)
    files = s.data_dir and file_batches(s, device)
    matmul, copy = ceilings(device, torch.bfloat16 if device.type == "cuda" else dtype)
    model = make_model(s, device, s.block_size).use_fast(s.compile)
    if s.fp8:
        use_float8(model, device, dtype, s.batch_size * s.block_size)
    step, batches = training_step(s, model, device, dtype), random_batches(s, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step(next(files or batches))
    _wait(device)
    first = time.perf_counter() - start
    if device.type == "cuda":
        peak_of_first = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = median_time(lambda: step(next(batches)), s.repeats, device)
    tokens = s.batch_size * s.block_size
    flops = model.flops_per_token(s.block_size) * tokens
    total, active = model.n_params()
    print(f"{describe(device)} · {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active · {s.batch_size} × {s.block_size} · {dtype}"
          f" · compile={s.compile} · doc_mask={s.doc_mask}" + " · fp8" * s.fp8)
    print(f"ceiling       {matmul / 1e12:8.1f} TFLOP/s matrix product   {copy / 1e12:6.2f} TB/s copy")
    print(f"first step    {first:8.1f} s")
    print(f"step          {seconds * 1e3:8.2f} ms")
    print(f"tokens/s      {tokens / seconds:8,.0f}")
    print(f"TFLOP/s       {flops / seconds / 1e12:8.1f}   {flops / seconds / matmul:.1%} of the ceiling"
          + (f"   {flops / seconds / peak_flops(device):.1%} of the data sheet's peak" if peak_flops(device) else ""))
    if files:
        rounds = [median_time(lambda: step(next(source)), s.repeats, device) for source in (files, batches) * 3]
        read, drawn = statistics.median(rounds[::2]), statistics.median(rounds[1::2])
        print(f"from files    {read * 1e3:8.2f} ms a step, random data in turns with it {drawn * 1e3:.2f} ms: {read / drawn - 1:+.1%}")
    if device.type == "cuda":
        print(f"peak memory   {torch.cuda.max_memory_allocated() / 2**30:8.1f} GiB" + f"   in the first step, in which the compiler tries its kernels, {peak_of_first / 2**30:.1f}" * s.compile)
        if s.profile:
            print_profile(lambda: [step(next(batches)) for _ in range(3)], 3, "ms a step")


def print_profile(function, parts, unit):
    """GPU time of one of the `parts` that a call of `function` consists of, by kind of kernel and by kernel; unit: "ms …" or "µs …"."""
    kinds = {"attention": ("flash", "fmha", "cudnn", "sdpa", "attention"), "matrix product": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
             "optimizer": ("adam", "multi_tensor", "lpnorm", "foreach"), "sort": ("sort", "scatter", "scan"), "fused element-wise and reductions": ("triton",)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    scale = {"ms": 1e-3, "µs": 1}[unit.split()[0]] / parts      # the profiler counts microseconds
    sums, rows = {}, []
    for event in profiler.key_averages():
        if event.self_device_time_total <= 0:
            continue
        kind = next((kind for kind, words in kinds.items() if any(word in event.key.lower() for word in words)), "other")
        took = event.self_device_time_total * scale
        sums[kind] = sums.get(kind, 0) + took
        rows.append((took, event.count / parts, event.key[:110]))
    print(f"\n{unit} by kind of kernel, {sum(count for _, count, _ in rows):.0f} kernels")
    for kind, took in sorted(sums.items(), key=lambda item: -item[1]):
        print(f"{took:8.2f}  {kind}")
    wall *= 1e6 * scale
    print(f"{wall - sum(sums.values()):8.2f}  gaps (wall {wall:.2f}, with the profiler on)\n\nthe 25 longest")
    for took, count, name in sorted(rows, reverse=True)[:25]:
        print(f"{took:8.2f}  {count:7.2f} ×  {name}")


def bench_decode(s):
    device = pick_device(s.device)
    if device.type == "cpu":
        from bench.decode import bench_decode_cpu
        return bench_decode_cpu(s)
    s.batch_size = s.batch_size or 1
    _, copy = ceilings(device, torch.bfloat16)
    model = make_model(s, device, s.prompt + s.new_tokens + 1).for_generation(device, torch.bfloat16)
    cache = model.new_cache(s.batch_size)
    prompts = torch.randint(1, s.vocab_size, (s.batch_size, s.prompt)).tolist()

    def answer():
        cache.tokens = [[] for _ in prompts]
        return sum(1 for _ in model.generate(prompts, s.new_tokens, top_k=20, cache=cache, compile=s.compile))
    start = time.perf_counter()
    assert answer() == s.new_tokens
    first = time.perf_counter() - start
    seconds = median_time(answer, s.repeats // 2, device, warmup=1)
    total, active = model.n_params()
    bound = copy / (2 * (active if s.batch_size == 1 else total))
    print(f"{describe(device)} · {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active · batch {s.batch_size} · prompt {s.prompt}, {s.new_tokens} new · bfloat16 · compile={s.compile}")
    print(f"first answer  {first:8.1f} s (capturing the graph{' and compiling' if s.compile else ''})")
    print(f"tokens/s      {s.batch_size * s.new_tokens / seconds:8,.0f}   prompt and sampling included")
    print(f"per step      {seconds / s.new_tokens * 1e6:8.0f} µs   reading the weights once at {copy / 1e12:.2f} TB/s: {1e6 / bound:.0f} µs, {s.new_tokens / seconds / bound:.1%} of that bound")
    if s.profile:
        print_profile(answer, s.new_tokens, "µs a token")


def main():
    s = configure(Settings)
    for key, least in (("repeats", 2), ("batch_size", 0), ("block_size", 1), ("prompt", 1), ("new_tokens", 1), ("vocab_size", 2)):
        if getattr(s, key) < least:
            raise UserError(f"{key}={getattr(s, key)} must be at least {least}")
    torch.backends.cuda.matmul.allow_tf32 = True
    what = s.what[0] if s.what else "train"
    if what == "train":
        bench_train(s)
    elif what == "decode":
        bench_decode(s)
    elif what == "data":
        from bench.data import bench_data
        bench_data(s.what[1:])
    else:
        raise UserError(f"bench.train measures train, decode or data, not {what!r}")


if __name__ == "__main__":
    run(main)
