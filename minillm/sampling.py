"""How the next token is drawn from the logits: temperature, top-k, top-p.

Nothing here asks the device for a number, so all of it can be part of a CUDA graph.
"""
import torch
from torch.nn import functional as F

from minillm.speed.fused import in_memory


def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one id a row from softmax(logits / temperature), cut to the top_k likeliest and to the
    smallest set that holds top_p of the probability.

    logits: (B, V); u: (B,) in [0, 1), the only randomness: the id is where the cumulative probability
    passes u. A row's u depends on its seed and step alone, so a row draws the same ids in any batch.
    temperature 0 is greedy. Returns (B,).
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        logits, ids = topk_by_parts(logits, top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    else:
        ids = None
    p = (logits.float() / temperature).softmax(-1)
    total = p.cumsum(-1)
    if top_p < 1:
        p = p * (total - p < top_p)              # the first one always stays
        total = p.cumsum(-1)
    choice = (total <= u[:, None] * total[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    return (choice if ids is None else ids.gather(1, choice))[:, 0]


def topk_by_parts(logits, k, width=32):
    """The k largest of each row of (B, V), in falling order, and their ids: each (B, k), k at most V.

    As topk; but of a long row first the k parts of `width` whose maxima are largest, which hold them
    all. On a GPU topk of one row of 32,000 takes some twenty small kernels.
    """
    if k * width * 2 > logits.shape[-1]:
        return logits.topk(k)
    parts = F.pad(logits, (0, -logits.shape[-1] % width), value=float("-inf")).unflatten(-1, (-1, width))
    part = topk_of_few(parts.amax(-1), k)[1]
    values, place = topk_of_few(in_memory(parts.gather(1, part[..., None].expand(-1, -1, width)).flatten(1)), k)
    return values, part.gather(1, place // width) * width + place % width


def topk_of_few(values, k):
    """topk, by counting where that is quicker: in a compiled step on a GPU, up to 2,048 values a row."""
    counting = values.is_cuda and torch.compiler.is_compiling() and values.shape[-1] <= 2048
    return topk_by_counting(values, k) if counting else values.topk(k)


def topk_by_counting(values, k):
    """topk of each row of (B, n): a value's place is the number of those before it. Of equal ones the first comes first.

    Of one row of 1,000 that are 2 kernels of 2 µs; sorting takes more and longer ones.
    """
    place = torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
    this, other = values[:, :, None], values[:, None]
    rank = ((other > this) | ((other == this) & (place < place[:, None]))).sum(-1, dtype=torch.int32)
    hit = rank[:, None] == place[:k, None]
    return torch.where(hit, values[:, None], 0).sum(-1), torch.where(hit, place, 0).sum(-1)
