"""What decoding a single row on a GPU is made of, written so that torch.compile makes few and quick kernels of it.

There a token takes as long as its hundred small kernels, one waiting for the other, and a kernel as long as reading its
weights at best. So a sum over a row is written as a product and a sum of it, which the compiler fuses with what
surrounds them; and no sum runs over more than 1,024 numbers, which it then holds in registers and does not loop over.
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
    return row_sums(weight * (wide * norm.weight).to(x.dtype).float()) * (mean_square + 1e-6).rsqrt()


def topk_by_counting(values, k):
    """topk of each row of (B, n): a value's place is the number of those before it. Of equal ones the first comes first.

    Counting n² pairs is quicker than sorting a few hundred values: 2 kernels of 2 µs.
    """
    place = torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
    this, other = values[:, :, None], values[:, None]
    rank = ((other > this) | ((other == this) & (place < place[:, None]))).sum(-1, dtype=torch.int32)
    hit = rank[:, None] == place[:k, None]
    return torch.where(hit, values[:, None], 0).sum(-1), torch.where(hit, place, 0).sum(-1)
