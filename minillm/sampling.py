"""How the next token is drawn from the logits: temperature, top-k, top-p, repetition penalty.

All of it runs without a GPU sync, so it can be part of a CUDA graph. No setting that SamplingParams
accepts leads to a NaN.

Papers: top-p arXiv 1904.09751, repetition penalty 1909.05858 (CTRL).
"""
import torch

GREEDY_BELOW = 1e-5      # a lower temperature gives the likeliest token all of the probability
# times a number below 2**32 it is below 1, even where float32 rounds that number up to 2**32
TO_UNIT = (1 - 2**-24) / 2**32


def sample(logits, u, temperature=1.0, top_k=0, top_p=1.0, topk=torch.topk):
    """Draw one id per row from softmax(logits / temperature), cut by top_k and top_p.

    logits: (B, V); u: (B,) in [0, 1), the only randomness, which depends on the row's seed and step
    alone. temperature 0 is greedy. topk: minillm/speed/topk.py has faster ones. Returns (B,).

    The draw is Gumbel-max, written as a race: argmin of Exp(1) / p is id i with probability p[i].
    Each id's exponential is a hash of (u, id), so neither the other rows nor the order of almost
    equal logits changes the choice; rounding does only where two ids are about to tie.
    """
    if temperature < GREEDY_BELOW or top_k == 1:
        return logits.argmax(-1)
    ids = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = topk(logits, top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        # topk and sort give falling order: `before` is the probability of all likelier ids
        before = p.cumsum(-1) - p
        p = p * (before < top_p)                 # the first one always stays
    if ids is None:
        ids = torch.arange(p.shape[-1], device=p.device).expand_as(p)
    choice = (exponential_noise(u[:, None], ids) / p).argmin(-1, keepdim=True)
    return ids.gather(1, choice)[:, 0]


def exponential_noise(u, ids):
    """A number of the exponential distribution Exp(1) per id: u (B, 1), ids (B, n) → (B, n)."""
    # ids + 1, because mix(0) is 0; u is a multiple of 2**-24
    bits = mix(ids + 1) ^ (u * 2**24).long()
    uniform = (mix(bits) + 0.5) * TO_UNIT
    return -torch.log1p(-uniform)


def mix(x):
    """A hash of whole numbers below 2**32: every bit of x moves every bit of the result.

    The constant is Thomas Mueller's, found by search for an even spread of the bits.
    """
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def penalize(logits, seen, penalty):
    """Make the tokens in `seen` (B, V), bool, less likely, whichever sign their logits have."""
    damped = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, damped, logits)
