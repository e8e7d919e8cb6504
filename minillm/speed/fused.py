"""Products for a single row on a GPU, written so that torch.compile makes few and quick kernels of what they are part of.

There a token takes as long as its hundred small kernels, one waiting for the other, and a kernel as long as reading its
weights at best. So a product is written as a multiplication and a sum along the row, which the compiler fuses with what
surrounds them; a row of a multiple of 1,024 is folded to that first, since so many numbers a kernel holds in registers, and
loops over more; and what many rows of the next product read goes through memory, or else each of them works it out again.
"""


def products(weight, x, expert=None):
    """What `weight @ x` sums up along its rows, folded to 1,024 columns if their number is a multiple of that: (out, in or 1024), float32.

    weight: (out, in), or with `expert`, a tensor of one index, the matrices (n, out, in) of which weight[expert] is meant.
    """
    fold = len(x) // 1024 if len(x) % 1024 == 0 else 1
    parts = zip(weight.unflatten(-1, (fold, -1)).unbind(-2), x.unflatten(-1, (fold, -1)).unbind(0))
    return sum((part if expert is None else part[expert][0]).float() * of_x.float() for part, of_x in parts)


def product(weight, x, norm=None):
    """weight @ x, or weight @ norm(x), whose scale is then found in the same pass over the row: (out,), float32."""
    if norm is None:
        return products(weight, x).sum(-1)
    x = x.float()
    mean_square = products(x.expand(weight.shape), x).sum(-1) / len(x)
    return products(weight, x * norm.weight).sum(-1) * (mean_square + 1e-6).rsqrt()


def in_memory(x):
    """x, which a compiler then writes to memory once, where it would else work it out again wherever it is read."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())     # only what is in memory has strides
