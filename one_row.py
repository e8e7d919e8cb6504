"""What decoding a single row on a GPU is made of, written so that torch.compile makes few and quick kernels of it.

There a token takes as long as its hundred small kernels, one waiting for the other, and a kernel as long as reading its
weights at best. So a sum over a row is written as a product and a sum of it, which the compiler fuses with what
surrounds them; and a row whose length is a multiple of 1,024 is summed in parts of that many, which it holds in registers
and does not loop over.
"""
import torch


def row_sums(products):
    """The sums over the last axis."""
    if products.shape[-1] % 1024:
        return products.sum(-1)
    return products.unflatten(-1, (-1, 1024)).sum(-1).sum(-1)


def product(weight, x, norm=None):
    """weight @ x, or weight @ norm(x), whose scale is then found in the same pass over the row.

    weight: (out, in); x: (in,); norm: an RMSNorm. Returns (out,), float32.
    """
    weight, wide = weight.float(), x.float()
    if norm is None:
        return row_sums(weight * wide)
    mean_square = row_sums((wide * wide).expand_as(weight)) / len(x)
    return row_sums(weight * (wide * norm.weight)) * (mean_square + 1e-6).rsqrt()
