"""What the Triton kernels for decoding share: how they start, wait, load, and rank.

A token takes as long as its 66 small kernels, one waiting for the other, and a kernel at best as
long as reading its weights. So on a GPU from Hopper on each kernel starts when the one ahead of it
has all of its input, gets ready, perhaps asks for weights, and then waits until the one ahead has
ended (programmatic dependent launch). Before this `wait` it may read what no kernel of this step
writes, or what one wrote that is not directly ahead. The rest it reads past the L1 cache (".cg"),
which may hold older numbers.
"""
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def launch(kernel, programs, *args, warps=4, **constants):
    """Start `programs` (a grid) of a kernel. args: the first of them is a tensor."""
    device = args[0].device
    overlap = (device.type == "cuda" and torch.version.cuda is not None
               and torch.cuda.get_device_capability(device) >= (9, 0))
    if overlap:
        constants["launch_pdl"] = True           # an option that Triton for AMD refuses
    with torch.cuda.device_of(args[0]):          # Triton's kernels run on the current GPU
        kernel[programs](*args, **constants, OVERLAP=overlap, num_warps=warps)


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until the kernel ahead has ended; then the next one may start."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fresh(pointer, mask):
    """Load what the kernels ahead have written, 0 where the mask is False."""
    return tl.load(pointer, mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def count_before(value, place, others, other_places):
    """How many of `others` are larger than each `value`, or equal and at an earlier place."""
    larger = others[None, :] > value[:, None]
    earlier = (others[None, :] == value[:, None]) & (other_places[None, :] < place[:, None])
    return tl.sum((larger | earlier).to(tl.int32), 1)
