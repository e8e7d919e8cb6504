"""Matrix-vector products written so that torch.compile makes few and fast GPU kernels of them.

At batch size 1 a token takes as long as its hundred small kernels, one waiting for the other, and a
kernel at best as long as reading its weights. So a product is written as a multiplication and a sum
along the row, which the compiler fuses with what surrounds them. A kernel holds 1,024 numbers in
registers and loops over more, so longer rows are folded to 1,024 columns first. What many rows of
the next product read goes through memory; otherwise each of them computes it again.
"""


def row_terms(weight, x, expert=None):
    """What `weight @ x` sums along its rows, in float32: (out, in), or folded to (out, 1024).

    weight: (out, in). With `expert`, indices (K,), weight is (E, out, in) and the terms are those
    of weight[expert], (K, out, in).
    """
    fold = 1
    if len(x) % 1024 == 0:
        fold = len(x) // 1024
    terms = 0
    parts = weight.unflatten(-1, (fold, -1)).unbind(-2)
    x_parts = x.unflatten(-1, (fold, -1)).unbind(0)
    for part, x_part in zip(parts, x_parts):
        if expert is not None:
            part = part[expert]
        terms = terms + part.float() * x_part.float()
    return terms


def matvec(weight, x, norm=None):
    """weight @ x, or weight @ norm(x), in float32: (out,).

    The norm's scale is found in the same pass over the row. Decoding with it made 1.22 times the
    tokens/s of one kernel per module (2,669, H100, `python -m bench.decode`).
    """
    if norm is None:
        return row_terms(weight, x).sum(-1)
    x = x.float()
    # the weights come first: a GPU may fetch them before x is there
    product = row_terms(weight, x * norm.weight).sum(-1)
    mean_square = row_terms(x.expand(weight.shape), x).sum(-1) / len(x)
    return product * (mean_square + norm.eps).rsqrt()


def realize(x):
    """x, which the compiler then writes to memory once and does not compute where it is read."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())     # only what is in memory has strides
