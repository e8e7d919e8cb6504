"""Which device, which number type, and how fast the device could be."""
import contextlib
import os

import torch

from minillm.errors import UserError
from minillm.report import counted

# Dense bf16 matmul peak in TFLOP/s by the vendors' data sheets; the first name that matches counts.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148,
               "B200": 2250, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121,
               "A6000": 155, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = "auto, cpu, mps, cuda or cuda:N"


def pick_device(name="auto", local_rank=0, world=1):
    """torch.device of "auto" (a GPU if there is one), "cpu", "mps", "cuda", "cuda:1"...

    Each of several processes takes the GPU of its local rank. UserError if it does not exist.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "mps" if mps and world == 1 else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda" and world > 1:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: {NAMES}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not supported: {NAMES}")
    if device.type == "mps" and not mps:
        raise UserError(f"device {name!r} was asked for, but torch sees no Apple GPU; "
                        "try --device=cpu")
    if device.type == "mps" and world > 1:
        raise UserError("device 'mps' is one device: it cannot be shared by several processes")
    gpus = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"device {name!r} was asked for, but torch sees {gpus} GPUs; "
                        "try --device=cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def pick_dtype(name, device):
    """torch.dtype of "auto", "float32", "bfloat16" or "float16".

    auto: bfloat16 if the device has units for it; float16 on older GPUs (T4, V100), which only
    emulate bfloat16; float32 otherwise.
    """
    if name == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if name == "auto":
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "mps":
        raise UserError("dtype=float16 is not supported on mps: take float32 or bfloat16")
    return DTYPES[name]


def start_compiler():
    """Start the processes that compile for a GPU, which first import torch, some seconds long."""
    with contextlib.suppress(ImportError):       # it is not a public function
        # late: a run that compiles nothing does not wait for the compiler
        from torch._inductor.async_compile import maybe_warm_pool
        maybe_warm_pool()


def prepare(device, deterministic, compiled=False):
    """Set what a training process needs: its GPU, fast float32 matmuls, deterministic kernels."""
    if device.type == "cuda":
        if compiled:
            start_compiler()                     # before the GPU: both take time to get ready
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # cuBLAS: deterministic
    torch.use_deterministic_algorithms(deterministic)


def autocast(device, dtype):
    """The context of a training forward pass: matmuls in `dtype`, weights in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compile_for_training(model, device):
    """torch.compile as train.py uses it and bench/train.py times it: one graph per batch shape."""
    # fast math: the GPU's own exp, as in its libraries' attention kernels; numbers below 1e-38
    # count as 0. combo kernels: small independent work, such as 16-bit copies of weights, together
    options = {"use_fast_math": True, "combo_kernels": True} if device.type == "cuda" else None
    return torch.compile(model, dynamic=False, options=options)


def to_device(tensors, device):
    """A tuple of host tensors, copied to the device; on CUDA without waiting for the copy."""
    if device.type == "cpu":
        return tensors
    if device.type != "cuda":                    # only CUDA copies from pinned memory
        return tuple(tensor.to(device) for tensor in tensors)
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


def peak_flops(device):
    """FLOP/s of the GPU's dense bf16 peak, or None where it isn't known (a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def describe(device):
    """A few words for the first line of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return f"CPU, {counted(torch.get_num_threads(), 'threads')}"
