"""Decoding on a GPU, written for torch.compile: one token of one row, or of a batch.

For a single row everything is a matrix-vector product of fused.py: six kernels per layer, with the
MoE nine. 2,930 to 3,518 tokens/s at 171M, depending on what the compiler's tuner chose; the
modules in a CUDA graph made 815 (H200, `python -m bench.decode`).
"""
import math

import torch
from torch.nn import functional as F

from minillm.attention import apply_rope
from minillm.generation import sample_next
from minillm.speed.fused import matvec, realize, row_terms
from minillm.speed.topk import top_experts, topk_compiled

MOST_GRAPHS = 200                    # of one function; torch's own limit is 8
BLOCK = 64                           # slots of the cache that a batch's attention reads or skips


def run_parts(parts, model, cache, token, position, end=None):
    """Fast version of generation.decode_one_token, if the parts are compiled.

    end: not used, the parts look at all slots.
    """
    embed, layer, finish = parts
    x, place = embed(model, cache, token, position)
    x, new = run_layers(layer, model, cache, x, place, position)
    return finish(model, cache, x, place, position, new)


def compile_step(batch, options, tuned):
    """Fast version of generation.decode_step for `batch` rows, compiled in four parts.

    All layers share one compiled part. options: for torch.compile; tuned: of the parts that read
    the weights. With the draw tuned as well, the first answer came after 37 s instead of 21, at the
    same speed (H200, `python -m bench.decode`, nothing cached). A CUDA graph that records the step
    leaves nothing but its kernels.
    """
    embed, layer, finish = VECTOR if batch == 1 else BATCH

    def begin(model, cache, state):
        # realize: what follows reads the position from memory
        position = realize((state.prompt_length + state.step - 1).clamp(max=cache.size))
        x, place = embed(model, cache, state.token, position)
        return x, place, position

    def draw(state, logits, params):
        sample_next(state, logits, params, topk_compiled)

    begin, draw = compile_parts((begin, draw), options)
    layer, finish = compile_parts((layer, finish), tuned)

    def step(model, cache, state, params):
        x, place, position = begin(model, cache, state)
        x, new = run_layers(layer, model, cache, x, place, position)
        draw(state, finish(model, cache, x, place, position, new), params)
    return step


def compile_parts(parts, options):
    # each temperature, batch and cache size has a graph of its own; beyond the limit torch fails
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    return [torch.compile(part, fullgraph=True, dynamic=False, options=options) for part in parts]


def run_layers(layer, model, cache, x, place, position):
    """The output of the last layer, and what else each layer returned.

    place: what every layer needs to know of the position, as the function that embeds returns it:
    of one row cos and sin, of a batch these and the filled blocks.
    """
    new = []
    for block, keys, values in zip(model.blocks, cache.k, cache.v):
        x, heads = layer(block, keys, values, x, place, position)
        new.append(heads)
    return x, new


# ---- a batch

def embed_batch(model, cache, token, position):
    """(the tokens' embeddings (B, 1, D), (cos and sin of their positions, filled_blocks))."""
    # clamp: RoPE has no row for the position of the padding; any will do
    rope = model.rope[:, position.clamp(max=cache.size - 1)][:, :, :, None]
    # a row without a token stands at the padding's position: one block is enough for it
    last = torch.where(position < cache.size, position, 0)
    return model.wte(token), (rope, filled_blocks(last, slots=cache.k[0].shape[2]))


def filled_blocks(position, slots):
    """Which blocks hold the slots up to each row's position (B, 1), as BlockMask takes it.

    Returns how many (B, 1, 1), and their numbers (B, 1, 1, all blocks), of which the first count.
    """
    count = (position // BLOCK + 1).int()[:, :, None]
    numbers = torch.arange(math.ceil(slots / BLOCK), dtype=torch.int32, device=position.device)
    return count, numbers.repeat(len(position), 1, 1, 1)


def batch_layer(block, keys, values, x, place, position):
    """One layer: (x (B, 1, D), None). Its k and v are written to the cache."""
    rope, blocks = place
    row = torch.arange(len(x), device=x.device)[:, None]

    def attend(q, k, v):
        keys[row, :, position] = k.transpose(1, 2).to(keys.dtype)
        values[row, :, position] = v.transpose(1, 2).to(values.dtype)
        return flex_cached_attention(q, keys, values, position, blocks)
    return block(x, rope, attend)[0], None


def finish_batch(model, cache, x, place, position, new):
    """The logits (B, V)."""
    return model.logits(model.norm(x)[:, -1])


def flex_cached_attention(q, k, v, position, blocks):
    """Fast version of attention.cached_attention for one new token per row, to be compiled.

    blocks: what filled_blocks returns. A batch of 64 makes 103,213 tokens/s; reading all slots, and
    with a slower top-k, 87,158 (H200, `python -m bench.decode --batch_size=64`).
    """
    # late: importing it takes 0.5 s, which chat on a CPU must not pay
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def visible(b, h, i, slot):
        return slot <= position[b, 0]
    # 128: blocks of queries, its default; there is one query
    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=(128, BLOCK), mask_mod=visible,
                                    seq_lengths=(1, k.shape[2]), compute_q_blocks=False)
    options = None
    # The kernel reads 32 slots at a time and fetches four times as many ahead; of heads of more
    # than 256 bytes these might exceed its shared memory
    if k.shape[3] * k.element_size() <= 256:
        options = {"BLOCK_N": 32, "num_stages": 4}
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)


# ---- one row: cache is a GraphCache, whose `keys` and `values` hold all layers in one tensor

def embed_vector(model, cache, token, position):
    """(the token's embedding (D,), cos and sin of its position)."""
    x = realize(model.wte.weight[token[0]][0])
    return x, realize(model.rope[:, position[0].clamp(max=cache.size - 1)])


def vector_layer(block, keys, values, x, rope, position):
    """One layer: (x (D,), its q, k and v before RoPE (heads, head_dim))."""
    attn, ffn, dtype = block.attn, block.ffn, x.dtype
    n_kv, group, hd = attn.n_kv_head, attn.n_head // attn.n_kv_head, attn.head_dim
    cos, sin = rope
    slot = torch.arange(keys.shape[2], device=x.device)
    here, visible = slot == position[0], slot <= position[0]
    # 1) q, k and v of the new token
    new = realize(linear(attn.qkv, x, block.attn_norm).to(dtype).view(-1, hd))
    q, new_k, new_v = new.float().split((attn.n_head, n_kv, n_kv))
    # The new token's k and v stand beside the cache, where `here` is True, and are written to it at
    # the end, all layers at once. RoPE turns q and the new k alike: their product needs no RoPE
    q_a, q_b = q.view(n_kv, group, 1, hd).chunk(2, -1)
    k_a, k_b = keys[0].float().chunk(2, -1)
    new_a, new_b = new_k[:, None].chunk(2, -1)
    turned_a, turned_b = q_a * cos - q_b * sin, q_a * sin + q_b * cos
    v = values[0].transpose(1, 2).float()        # (n_kv_head, head_dim, slots)

    # 2) attention and its output product, for the queries of a group one by one
    y = 0
    for g in range(group):                       # scores and weights: (n_kv_head, slots)
        fresh = q_a[:, g] * new_a + q_b[:, g] * new_b
        terms = torch.where(here[:, None], fresh, turned_a[:, g] * k_a + turned_b[:, g] * k_b)
        scaled = terms.sum(-1) * (math.log2(math.e) * hd ** -0.5)
        score = realize(torch.where(visible, scaled, float("-inf")))
        # Each channel of v computes the softmax itself, which is faster than reading it from
        # memory. `v - v`, which is 0, makes the softmax's sums run along v's rows, so that the
        # compiler holds them in registers, as it does v
        score = score[:, None] + (v - v)
        weight = (score - score.amax(-1, keepdim=True)).exp2()
        attended = (torch.where(here, new_v[:, :, None], v) * weight).sum(-1) / weight.sum(-1)
        proj = attn.proj.weight.unflatten(1, (n_kv, group, -1))[:, :, g].flatten(1)
        y = y + row_terms(proj, realize(attended.to(dtype).flatten()))
    y = y.sum(-1)
    if attn.proj.bias is not None:
        y = y + attn.proj.bias
    x = realize((x + y).to(dtype))

    # 3) the FFN or the experts
    if hasattr(ffn, "router"):
        y = moe(ffn, realize(block.ffn_norm(x)))
    else:
        y = linear(ffn.down, realize(F.silu(linear(ffn.up, x, block.ffn_norm)).to(dtype)))
    return realize((x + y).to(dtype)), new


def finish_vector(model, cache, x, rope, position, new):
    """Write every layer's k and v to the cache; return the logits (1, V), float32."""
    c, n_kv = model.config, model.config.n_kv_head
    new = torch.stack(new)[:, None, :, None]     # (n_layer, 1, heads, 1, head_dim)
    cache.keys[:, :, :, position[0]] = apply_rope(new[:, :, c.n_head: -n_kv], rope[:, :, None])
    cache.values[:, :, :, position[0]] = new[:, :, -n_kv:]
    return realize(matvec(model.wte.weight, x, model.norm))[None]


def linear(layer, x, norm=None):
    y = matvec(layer.weight, x, norm)
    if layer.bias is not None:
        y = y + layer.bias
    return y


def moe(layer, x_D):
    """The chosen experts' rows, each read once. Returns (D,), float32."""
    logits_E = matvec(layer.router.weight_DE.t(), x_D)
    expert_K = top_experts(logits_E[None], layer.router.k)[0]
    top = logits_E.max()
    gate_K = (logits_E[expert_K] - top).exp()
    total = gate_K.sum()
    if layer.router.k == 1:
        total = (logits_E - top).exp().sum()     # as in moe.py: a softmax over all experts
    hidden_KF = row_terms(layer.w1_EDF.transpose(1, 2), x_D, expert_K).sum(-1)
    rows_KF = realize((F.silu(hidden_KF) * (gate_K / total)[:, None]).to(x_D.dtype))
    terms = 0
    for expert, row_F in zip(expert_K.split(1), rows_KF):
        terms = terms + row_terms(layer.w2_EFD.transpose(1, 2), row_F, expert)[0]
    return terms.sum(-1)


# what embeds the tokens, what computes one layer, and what follows the layers
VECTOR = embed_vector, vector_layer, finish_vector
BATCH = embed_batch, batch_layer, finish_batch
