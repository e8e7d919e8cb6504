"""Top-k for the shapes of this model; torch.topk takes twenty small kernels per row on a GPU."""
import torch
from torch.nn import functional as F


def topk_by_parts(logits, k, width=32):
    """Fast version of torch.topk(logits, k) for long rows: values, ids (B, k), in falling order.

    Of parts of `width` logits, the k whose maxima are largest hold all of the k largest.
    """
    if k * width * 2 > logits.shape[-1]:
        return logits.topk(k)
    padding = -logits.shape[-1] % width
    parts = F.pad(logits, (0, padding), value=float("-inf")).unflatten(-1, (-1, width))
    part = parts.amax(-1).topk(k)[1]                                        # (B, k)
    candidates = parts.gather(1, part[..., None].expand(-1, -1, width))     # (B, k, width)
    values, location = candidates.flatten(1).topk(k)
    return values, part.gather(1, location // width) * width + location % width


def top_experts(logits_NE, k):
    """Fast version of moe.top_experts: indices (N, k) of each row's k largest, in falling order.

    For a handful of experts the compiler makes one kernel of this; torch.topk is three.
    """
    column_E = torch.arange(logits_NE.shape[1], device=logits_NE.device)
    left_NE = logits_NE.detach()
    indices = []
    for _ in range(k):
        indices.append(left_NE.argmax(dim=1, keepdim=True))
        left_NE = left_NE.masked_fill(column_E == indices[-1], float("-inf"))
    return torch.cat(indices, dim=1)
