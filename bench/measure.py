"""What the benchmarks share: the shape of a model, median times, this machine's limits, a profile.

Times are medians after warm-up. On a GPU an event marks the end of each call and the host does not
wait between two of them, as it doesn't between two steps of train.py.
"""
import statistics
import time
from dataclasses import dataclass, fields

import torch

from minillm.configurator import NonNegative, Positive, whole
from minillm.device import describe
from model import GPT, GPTConfig

# kinds of kernels, by words in their names; the first kind that matches counts
KINDS = {
    "attention": ["flash", "fmha", "cudnn", "sdpa", "attention"],
    "matmul": ["gemm", "nvjet", "cutlass", "xmma", "cublas"],
    "optimizer": ["adam", "multi_tensor", "lpnorm", "foreach"],
    "sort": ["sort", "scatter", "scan"],
    "fused element-wise and reductions": ["triton"],
}


@dataclass
class ModelShape:
    # the model; by default the dense one of 171M parameters
    n_layer: Positive = 12            # blocks
    n_head: Positive = 16             # query heads
    n_kv_head: Positive = 8           # key/value heads
    n_embd: Positive = 1024           # width of the residual stream
    n_inner: NonNegative = 0          # width of the FFN or of one expert; 0: 4 * n_embd
    n_expert: NonNegative = 0         # experts per layer; 0: a dense model
    vocab_size: whole(2) = 32000      # rows of the embedding


def make_model(shape, block_size, device):
    """A GPT of this shape with random weights."""
    config = {field.name: getattr(shape, field.name) for field in fields(ModelShape)}
    torch.manual_seed(0)
    with device:
        return GPT(GPTConfig(block_size=block_size, **config))


def print_headline(model, device, *about):
    """Print what is measured: the device, the model, and what else `about` says."""
    total, active = model.n_params()
    size = f"{total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active"
    print(" · ".join([describe(device), size, *about]))


def wait(device):
    """Return once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device):
    """Seconds of one call, the first of its kind included."""
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def median_time(function, repeats, device, warmup=5):
    """Median seconds of one call of `function`, after `warmup` calls."""
    marks = []

    def mark():
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    mark()
    for _ in range(warmup + repeats):
        function()
        mark()
    wait(device)
    pairs = list(zip(marks, marks[1:]))[warmup:]
    if device.type == "cuda":
        return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3
    return statistics.median(b - a for a, b in pairs)


def matmul_ceiling(device, dtype):
    """FLOP/s of one large matmul of random numbers."""
    if device.type == "cuda":
        n, repeats = 8192, 20
    else:
        n, repeats = 2048, 5
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median_time(lambda: a @ b, repeats, device)


def copy_ceiling(device):
    """Bytes/s of one large copy, read and written."""
    numbers = 1 << 30 if device.type == "cuda" else 1 << 26
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_time(lambda: target.copy_(source), 10, device)


def print_profile(function, parts, unit):
    """Print where the GPU's time goes, by kind of kernel and by kernel.

    A call of `function` consists of `parts` steps or tokens; unit: "ms per …" or "µs per …" of one.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds = seconds_of(function, torch.device("cuda"))
    per_part = (1e-3 if unit.startswith("ms") else 1) / parts       # the profiler counts in µs
    kernels = []                                                    # (time, count, name)
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            took = event.self_device_time_total * per_part
            kernels.append((took, event.count / parts, event.key[:110]))
    by_kind = dict.fromkeys([*KINDS, "other"], 0)
    for took, _, name in kernels:
        by_kind[kind_of(name)] += took

    print(f"\n{unit} by kind of kernel, {sum(count for _, count, _ in kernels):.0f} kernels")
    for kind, took in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"{took:8.2f}  {kind}")
    wall = seconds * 1e6 * per_part
    gaps = wall - sum(by_kind.values())
    print(f"{gaps:8.2f}  gaps (wall {wall:.2f}, with the profiler on)\n\nthe 25 longest")
    for took, count, name in sorted(kernels, reverse=True)[:25]:
        print(f"{took:8.2f}  {count:7.2f} ×  {name}")


def kind_of(kernel):
    for kind, words in KINDS.items():
        if any(word in kernel.lower() for word in words):
            return kind
    return "other"
