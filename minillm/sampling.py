"""How the next token is drawn from the logits: temperature, top-k, top-p, repetition penalty.

Nothing here asks the device for a number, so all of it can be part of a CUDA graph.

Papers: top-p arXiv 1904.09751, repetition penalty 1909.05858 (CTRL).
"""
import torch


def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0, topk=torch.topk):
    """Draw one id per row from softmax(logits / temperature), cut by top_k and top_p.

    logits: (B, V); u: (B,) in [0, 1), the only randomness: the id is where the cumulative
    probability passes u. A row's u depends on its seed and step alone, so a row draws the same ids
    in any batch. temperature 0 is greedy. topk: minillm/speed/topk.py has faster ones. Returns
    (B,).
    """
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    ids = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = topk(logits, top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    p = (logits.float() / temperature).softmax(-1)
    total = p.cumsum(-1)
    if top_p < 1:
        p = p * (total - p < top_p)              # the first one always stays
        total = p.cumsum(-1)
    target = u[:, None] * total[:, -1:]
    choice = (total <= target).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    if ids is not None:
        choice = ids.gather(1, choice)
    return choice[:, 0]


def penalize(logits, seen, penalty):
    """Make the tokens in `seen` (B, V), bool, less likely, whichever sign their logits have."""
    damped = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, damped, logits)
