"""Attention as functions without weights: rotary positions, masks, and attention itself.

    rope = rope_table(config)                            # (2, block_size, head_dim / 2): cos, sin
    q = apply_rope(q, rope[:, :T, None])                 # q: (B, T, n_head, head_dim)
    y = causal_attention(q, k, v, document_mask(idx))    # q: (B, n_head, T, head_dim)

Attention is computed in five places: in causal_attention (training) without a mask, with a mask and
with flex_attention, and in cached_attention (decoding) for several tokens and for one. Make a
change in all five: check_attention of same_function.py says where it is missing. Which tokens are
seen (a window, say) is decided in the first of these, in both masks of document_mask, and by
`visible` in generation.cached_forward. torch's kernels group the query heads (GQA), so k and v are
never repeated.

Papers: RoPE arXiv 2104.09864, GQA 2305.13245, flex_attention 2412.05496.
"""
import torch
from torch.nn import functional as F

from minillm.tokenizer import END_OF_TEXT


def rope_table(config):
    """cos and sin of position × frequency: (2, block_size, head_dim / 2), float32."""
    half = config.n_embd // config.n_head // 2
    # in float64: in float32 an angle at position 100,000 is off by up to 0.004
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.block_size, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def apply_rope(x, rope):
    """Rotate each pair of channels (i, i + half) by the angle of its position.

    x: (B, T, H, head_dim); rope: cos and sin that broadcast to (B, T, H, head_dim / 2). Returns x's
    shape. The pairs are those of GPT-NeoX and Llama; the paper pairs (2i, 2i + 1), the same up to
    the order of the channels. minillm/speed repeats the formula for decoding.
    """
    cos, sin = rope
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def document_mask(idx, flex=False):
    """What each token may see: the tokens of its own document, up to itself.

    idx: (B, T); a document ends with its <|endoftext|>. Returns a bool tensor (B, 1, T, T), True
    where attention is allowed. flex=True: a BlockMask for flex_attention, whose kernel skips what
    is masked and is fast only if compiled. Call it outside the compiled model: torch 2.11 cannot
    compile the validation with this inside.

    Positions are counted from the start of the row, not of the document. RoPE sees differences of
    positions only, and those inside a document are the same either way.
    """
    B, T = idx.shape
    ends = (idx == END_OF_TEXT).int()
    document = ends.cumsum(1) - ends             # (B, T): the number of the token's document
    if flex:
        return _flex_document_mask(document)
    causal = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
    return (causal & (document[:, :, None] == document[:, None, :]))[:, None]


def _flex_document_mask(document):
    # late: importing it takes 0.5 s, and only training on packed documents needs it
    from torch.nn.attention.flex_attention import create_block_mask

    def same_document(b, h, q, k):
        return (q >= k) & (document[b, q] == document[b, k])
    B, T = document.shape
    create = create_block_mask
    if document.is_cuda:
        create = torch.compile(create_block_mask, dynamic=False)
    return create(same_document, B, None, T, T, device=document.device)


def causal_attention(q, k, v, mask=None):
    """Attention over the whole row, for training and scoring.

    q: (B, n_head, T, head_dim), k and v: (B, n_kv_head, T, head_dim). mask: None for plain causal,
    or what document_mask returns. Returns (B, n_head, T, head_dim).
    """
    if q.device.type == "cpu" and q.dtype.itemsize == 2:
        # in 16 bits the backward pass takes four times as long (torch 2.13, rows of 128 tokens)
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    from torch.nn.attention.flex_attention import flex_attention      # late: as above
    # contiguous: k may be a view with an offset into a larger buffer, and torch (2.11 and 2.13),
    # compiled without a backward pass, reads it from the buffer's start
    return flex_attention(q, k.contiguous(), v, block_mask=mask, enable_gqa=True)


def cached_attention(q, k, v, visible):
    """Attention of n new tokens over a KV cache that already holds their k and v.

    q: (B, n_head, n, head_dim), k and v: (B, n_kv_head, slots, head_dim), visible: (B, 1, n,
    slots), True where a token sees a slot. Returns (B, n_head, n, head_dim).
    """
    if q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    # One query: the heads of a group become the rows of one query matrix, so k and v are read once
    grouped = q.view(len(q), k.shape[1], -1, q.shape[3])
    # reshape: for several rows of float32 a GPU's kernel returns other strides
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible).reshape(q.shape)
