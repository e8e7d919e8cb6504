"""Generation with a KV cache: read the prompt once, then make one token at a time.

    cache = KVCache(model, batch=1)
    for ids in generate(model, [prompt], SamplingParams(max_new_tokens=20), cache=cache):
        ...                              # one new id per row, None where a row has ended

What calls what:

    generate                 checks the prompts, and yields ids until every row has ended
      prefill                reads the prompts into the cache → logits of the token after them
      decode_loop            yields the ids of all rows, one step after the other
        decode_step          one step: position of the token, then the two below
          decode_one_token   the model over one token per row → logits of the next one
          sample_next        draws the next token from the logits

A row ends at one of `stop_ids` (of a chat: answer.STOP_IDS); text_stream.py handles stop
strings.

`decode_step`, what it calls, and `cached_forward` read nothing back from the device, so that
minillm/speed can record them in CUDA graphs. The fast versions there come in as the arguments
`forward` (instead of cached_forward) and `decode` (instead of decode_loop).
"""
import torch

from minillm.attention import cached_attention
from minillm.errors import UserError
from minillm.sampling import penalize, sample
from minillm.sampling_params import SamplingParams


class KVCache:
    """Keys and values of every token so far.

    k[layer] and v[layer]: (B, n_kv_head, slots, head_dim). tokens[b]: the ids of row b that are in
    the cache. size: the most tokens of a row (0: block_size). Slot `size`, after the last token's,
    is for padding: it is written, but no token sees it. n_prefilled: how many prompt tokens were
    computed, in all calls together.
    """

    def __init__(self, model, batch=1, size=0):
        c = model.config
        self.size = min(size or c.block_size, c.block_size)
        # a multiple of 16 slots, so that a GPU reads 16 bytes at a time
        slots = round_up(self.size + 1, 16)
        shape = (batch, c.n_kv_head, slots, c.n_embd // c.n_head)
        self.allocate(model.wte.weight, c.n_layer, shape)
        self.tokens = [[] for _ in range(batch)]
        self.n_prefilled = 0
        self.state = None                        # the DecodeState of the newest `generate`

    def allocate(self, like, n_layer, shape):
        self.k = [like.new_zeros(shape) for _ in range(n_layer)]
        self.v = [like.new_zeros(shape) for _ in range(n_layer)]


class DecodeState:
    """What decoding carries from token to token, on the device.

    token, prompt_length: (B, 1); step: (1,), tokens made so far; u: (B, steps), random numbers;
    seen: (B, V), ids that the repetition penalty hits. They are allocated once and overwritten in
    place, because a CUDA graph reads fixed addresses.
    """

    def __init__(self, model, batch, steps):
        device = model.wte.weight.device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.prompt_length = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.u = torch.zeros(batch, steps, device=device)
        # rows of the embedding beyond the tokenizer's vocabulary have no token and are never drawn
        vocab_size = model.config.vocab_size
        if model.tokenizer:
            vocab_size = model.tokenizer.vocab_size
        self.seen = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device)

    def start(self, prompts, params, seed, stop_ids):
        """Set everything for new prompts; row b draws from seed + b."""
        steps = min(params.max_new_tokens, self.u.shape[1])
        u = torch.empty(len(prompts), steps)
        for b, row in enumerate(u):
            generator = torch.Generator().manual_seed((seed + b) % 2**63)
            row.copy_(torch.rand(steps, generator=generator))
        self.u[:, :steps].copy_(u)
        if params.repetition_penalty != 1:
            seen = torch.zeros(self.seen.shape, dtype=torch.bool)   # on the host, one transfer
            for row, prompt in zip(seen, prompts):
                row[list(prompt)] = True
                row[list(stop_ids)] = False
            self.seen.copy_(seen)
        self.step.zero_()
        self.prompt_length.copy_(torch.tensor([[len(prompt)] for prompt in prompts]))


def cached_forward(model, cache, idx, position, end):
    """Run the model over new tokens, which see the cache's slots below `end`.

    idx: (B, n) ids; position: (B, n), where each stands (cache.size: padding). Writes their k and v
    into the cache. Returns the output of the last norm, (B, n, n_embd).
    """
    device = model.wte.weight.device
    idx, position = idx.to(device), position.to(device)
    slot = torch.arange(end, device=device)
    visible = (slot <= position[:, :, None])[:, None]                # (B, 1, n, end)
    # clamp: RoPE has no row for the position of the padding; any will do
    rope = model.rope[:, position.clamp(max=cache.size - 1)][:, :, :, None]
    row = torch.arange(len(idx), device=device)[:, None]

    def attend(q, k, v, layer):
        # of a changed model: blocks that run twice, heads that differ from layer to layer
        if layer >= len(cache.k) or k.shape[1::2] != cache.k[layer].shape[1::2]:
            raise UserError(f"layer {layer} of the model does not fit the KV cache, which has "
                            "n_layer layers of n_kv_head heads: change KVCache in "
                            "minillm/generation.py as well")
        keys, values = cache.k[layer], cache.v[layer]
        keys[row, :, position] = k.transpose(1, 2).to(keys.dtype)
        values[row, :, position] = v.transpose(1, 2).to(values.dtype)
        return cached_attention(q, keys[:, :, :end], values[:, :, :end], visible)
    return model.trunk(idx, rope, attend)[0]


def prefill(model, cache, prompts, forward=cached_forward):
    """Make the cache hold exactly `prompts` (lists of ids, one per row).

    What a row shares with the cache's tokens is kept and not computed again. Returns the logits (B,
    V) of the token after each prompt. Raises UserError where they are not finite.
    """
    # 1) what is new: all tokens after the common beginning, and at least the last one
    starts = [common_length(prompt[:-1], old) for prompt, old in zip(prompts, cache.tokens)]
    # if this is interrupted: from here on the old tokens' slots are overwritten
    cache.tokens = [list(prompt[:start]) for prompt, start in zip(prompts, starts)]

    # 2) one rectangle of new tokens; the short rows write their padding to slot `size`
    width = max(len(prompt) - start for prompt, start in zip(prompts, starts))
    idx = torch.zeros(len(prompts), width, dtype=torch.long)
    position = torch.full_like(idx, cache.size)
    for b, (prompt, start) in enumerate(zip(prompts, starts)):
        idx[b, : len(prompt) - start] = torch.tensor(prompt[start:])
        position[b, : len(prompt) - start] = torch.arange(start, len(prompt))
    x = forward(model, cache, idx, position, max(map(len, prompts)))

    # 3) the logits after each row's last token
    cache.tokens = [list(prompt) for prompt in prompts]
    cache.n_prefilled += sum(map(len, prompts)) - sum(starts)
    last = [len(prompt) - start - 1 for prompt, start in zip(prompts, starts)]
    row = torch.arange(len(prompts), device=x.device)
    logits = model.logits(x[row, torch.tensor(last, device=x.device)])
    if not logits.isfinite().all():              # otherwise every row would silently be empty
        raise UserError("the model computes NaN or infinity: its weights are not finite, or "
                        f"too large for {str(logits.dtype).removeprefix('torch.')}")
    return logits


def decode_one_token(model, cache, token, position, end):
    """token, position: (B, 1) → logits (B, V) of the next one. end: see cached_forward."""
    return model.logits(cached_forward(model, cache, token, position, end)[:, -1])


def sample_next(state, logits, params, topk=torch.topk):
    """Draw the next token of every row from its logits (B, V) into state.token."""
    logits = logits[:, : state.seen.shape[1]]
    if params.repetition_penalty != 1:
        logits = penalize(logits, state.seen, params.repetition_penalty)
    u = state.u.index_select(1, state.step)[:, 0]
    token = sample(logits, u, *params.for_sample(), topk=topk)
    state.token.copy_(token[:, None])
    if params.repetition_penalty != 1:
        state.seen.scatter_(1, state.token, True)
    state.step += 1


def decode_step(model, cache, state, params, end, decode_one_token=decode_one_token,
                topk=torch.topk):
    """Make one more token in every row, in place, without a GPU sync."""
    # clamp: a row that has run to the end of the cache writes to the padding slot from there on
    position = (state.prompt_length + state.step - 1).clamp(max=cache.size)
    logits = decode_one_token(model, cache, state.token, position, end)
    sample_next(state, logits, params, topk)


def decode_loop(model, cache, state, params, logits, steps, decode_one_token=decode_one_token,
                topk=torch.topk):
    """Yield `steps` times the list of every row's next id. logits: (B, V), from prefill."""
    longest = int(state.prompt_length.max())
    sample_next(state, logits, params, topk)
    yield state.token[:, 0].tolist()
    for t in range(1, steps):
        end = min(longest + t, cache.size)
        decode_step(model, cache, state, params, end, decode_one_token, topk)
        yield state.token[:, 0].tolist()


@torch.inference_mode()
def generate(model, prompts, params=SamplingParams(), seed=0, stop_ids=(), cache=None,
             forward=cached_forward, decode=decode_loop):
    """Yield, for each step, the list of the rows' new ids; None for a row that has ended.

    prompts: B non-empty lists of ids. A row ends after params.max_new_tokens, with an id of
    stop_ids (which is yielded), or at the end of the cache. Row b draws from seed + b. Pass the
    same cache again to continue a conversation: the common beginning is not computed twice. The
    repetition penalty applies to ids of the prompt and of the answer, except stop_ids. forward,
    decode: faster ones from minillm/speed. Raises UserError if a prompt leaves no room in the
    context.
    """
    # 1) is there room?
    cache = cache or KVCache(model, len(prompts))
    if len(cache.tokens) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but the cache has {len(cache.tokens)} rows")
    for prompt in prompts:
        if not 0 < len(prompt) < cache.size:
            raise UserError(f"a prompt of {len(prompt)} tokens does not fit: the context holds "
                            f"{cache.size}, and at least one token goes in and one comes out")

    # 2) read the prompts
    state = cache.state = cache.state or DecodeState(model, len(prompts), cache.size)
    state.start(prompts, params, seed, stop_ids)
    logits = prefill(model, cache, prompts, forward)

    # 3) make tokens until every row has ended
    room = [min(params.max_new_tokens, cache.size - len(prompt)) for prompt in prompts]
    ended = [False] * len(prompts)
    previous = None
    for t, new in enumerate(decode(model, cache, state, params, logits, max(room))):
        row = []
        for b, token in enumerate(new):
            if ended[b]:
                row.append(None)
                continue
            row.append(token)
            if t > 0:
                cache.tokens[b].append(previous[b])      # this step has written its k and v
            ended[b] = token in stop_ids or t + 1 >= room[b]
        previous = new
        yield row
        if all(ended):
            return


def common_length(a, b):
    """How many ids the lists a and b share at their beginning."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def round_up(n, multiple):
    """The smallest multiple of `multiple` that is at least n."""
    return (n + multiple - 1) // multiple * multiple
