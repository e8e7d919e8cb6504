"""Which device, which number type, and how fast the device could be."""
import contextlib

import torch

from minillm.errors import UserError

# Dense bf16 matrix peak in TFLOP/s by the vendors' data sheets; the first name that matches counts.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148, "B200": 2250,
               "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A6000": 155, "A10": 125,
               "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name="auto"):
    """torch.device of "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"... UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported: auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} GPUs; try --device=cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def pick_dtype(name, device):
    """torch.dtype of "auto", "float32", "bfloat16" or "float16". auto is bfloat16 where the device multiplies in it, else float32."""
    if name == "auto":
        # an older torch cannot say what the CPU can
        quick = torch.cuda.is_bf16_supported if device.type == "cuda" else getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
        return torch.bfloat16 if quick() else torch.float32
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast(device, dtype):
    """The context in which the model runs while training: matrix products in `dtype`, weights in float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compile_for_training(model, device):
    """torch.compile as train.py uses it and bench.py times it: one graph for each shape of a batch."""
    # fast math: the GPU's own exp, as in its libraries' attention kernels; numbers below 1e-38 count as 0.
    # combo kernels: what is small and independent, such as 16-bit copies of weights, several in one launch
    options = {"use_fast_math": True, "combo_kernels": True} if device.type == "cuda" else None
    return torch.compile(model, dynamic=False, options=options)


def send(batch, device):
    """A tuple of tensors on the host, under way to the device: the host does not wait."""
    return batch if device.type == "cpu" else tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)


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
    return f"CPU, {torch.get_num_threads()} threads"
