"""Top-k for the shapes of this model; torch.topk takes twenty small kernels per row on a GPU."""
import torch
from torch.nn import functional as F

from minillm.speed.fused import realize


def topk_by_parts(logits, k, width=32, topk=torch.topk):
    """Fast version of torch.topk(logits, k) for long rows: values, ids (B, k), in falling order.

    Of parts of `width` logits, the k whose maxima are largest hold all of the k largest. 29 µs
    instead of 55 for a row of 32,000 (H200, within `python -m bench.decode`).
    """
    if k * width * 2 > logits.shape[-1]:
        return logits.topk(k)
    padding = -logits.shape[-1] % width
    parts = F.pad(logits, (0, padding), value=float("-inf")).unflatten(-1, (-1, width))
    part = topk(parts.amax(-1), k)[1]                                       # (B, k)
    candidates = parts.gather(1, part[..., None].expand(-1, -1, width))     # (B, k, width)
    values, location = topk(realize(candidates.flatten(1)), k)
    return values, part.gather(1, location // width) * width + location % width


def topk_compiled(logits, k):
    """topk_by_parts for a compiled decode step: it counts instead of sorting."""
    return topk_by_parts(logits, k, topk=_topk_of_few)


def _topk_of_few(values, k):
    rows, n = values.shape
    if n > 2048:
        return values.topk(k)
    if rows > 8 and 16 * k <= n:
        # counting compares all with all: 64 rows of 1,000 take 34 µs, in parts of 8 some 8 µs. A
        # few rows are faster without parts, and so is a k for which half of the parts would stay
        return topk_by_parts(values, k, width=8, topk=topk_by_counting)
    return topk_by_counting(values, k)


def topk_by_counting(values, k):
    """topk of each row of (B, n): a value's rank is the number of larger ones, or equal before it.

    For one row of 1,000 these are 2 kernels of 2 µs; sorting takes more and longer ones (H100,
    within `python -m bench.decode`).
    """
    index = torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
    this, other = values[:, :, None], values[:, None]
    before = (other > this) | ((other == this) & (index < index[:, None]))
    rank = before.sum(-1, dtype=torch.int32)
    hit = rank[:, None] == index[:k, None]
    return torch.where(hit, values[:, None], 0).sum(-1), torch.where(hit, index, 0).sum(-1)


def top_experts(logits_NE, k):
    """Fast version of moe.top_experts: indices (N, k) of each row's k largest, in falling order.

    For a handful of experts the compiler makes one kernel of this; torch.topk is three. Decoding
    with the MoE made 1,180 tokens/s instead of 1,002, together with combo kernels (H200,
    `python -m bench.decode --n_expert=8`).
    """
    column_E = torch.arange(logits_NE.shape[1], device=logits_NE.device)
    left_NE = logits_NE.detach()
    indices = []
    for _ in range(k):
        indices.append(left_NE.argmax(dim=1, keepdim=True))
        left_NE = left_NE.masked_fill(column_E == indices[-1], float("-inf"))
    return torch.cat(indices, dim=1)
