"""The decoder, its KV cache and generation.

    model = GPT(GPTConfig(n_layer=12))
    loss_sum, moe = model(idx, targets)              # training
    model = GPT.from_checkpoint("out/demo_sft")      # using a trained one
    model.chat([{"role": "user", "content": "你好"}])

Pre-norm blocks (norm → sub-layer → residual): RMSNorm, attention with RoPE and grouped queries (GQA),
a two-layer SiLU FFN or the mixture of experts of moe.py; the output projection is the embedding.
With 12 layers of width 1024, 16 query and 8 key/value heads and 32,000 tokens: 171 M parameters.

Papers: RMSNorm arXiv 1910.07467, RoPE 2104.09864, GQA 2305.13245, tied embeddings 1608.05859.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from minillm.errors import UserError
from minillm.speed.fused import in_memory
from minillm.speed.linear import Linear
from moe import ALL_EXPERTS_TOKENS, MoE
from minillm.speed.one_row import decode_one_row, decode_one_row_compiled
from minillm.attention import apply_rope, rope_table
from minillm.sampling import sample

LOG2_E = math.log2(math.e)
END_OF_TEXT = 0          # ends every document; attention may be told not to look across it


@dataclass
class GPTConfig:
    block_size: int = 512
    vocab_size: int = 32000
    n_layer: int = 12
    n_head: int = 16
    n_kv_head: int = 8
    n_embd: int = 1024
    n_inner: int = 0             # width of the FFN, or of one expert; 0 means 4 * n_embd
    n_expert: int = 0            # 0: dense
    n_expert_per_tok: int = 4
    rope_theta: float = 10000.0
    dropout: float = 0.0
    bias: bool = False

    def __post_init__(self):
        """Fill in n_inner. Raises UserError on sizes that do not fit together."""
        self.n_inner = self.n_inner or 4 * self.n_embd
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.n_embd // self.n_head % 2:
            raise UserError(f"RoPE needs an even head width, not n_embd/n_head={self.n_embd // self.n_head}")
        if self.n_expert and not 1 <= self.n_expert_per_tok <= self.n_expert <= 256:
            raise UserError(f"n_expert_per_tok={self.n_expert_per_tok} of n_expert={self.n_expert} (at most 256) cannot be chosen")
        if self.n_expert and (self.n_embd % 8 or self.n_inner % 8):
            raise UserError(f"n_embd={self.n_embd} and n_inner={self.n_inner} must be multiples of 8 with experts: their product reads 16 bytes at a time")
        if self.n_expert and self.bias:
            raise UserError("bias=True is not offered with experts (n_expert > 0)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be in [0, 1)")


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        # the mean square of a bf16 row is taken in float32
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), 1e-6).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_width = config.n_embd // config.n_head
        self.dropout = config.dropout
        # q, k and v in one matrix: one larger product instead of three
        self.qkv = Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.head_width, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope, mask=None, cache=None):
        """x: (B, T, C) → (B, T, C). mask: None for plain causal; cache: (k, v, position) to write to and read from."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_width).split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        # A copy of v: a slice would keep all of qkv in memory for the backward pass
        q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, rope), apply_rope(k, rope), v.contiguous()))
        if cache is not None:
            y = self.attend_cache(q, k, v, mask, *cache)
        else:
            y = attend(q, k, v, mask)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)

    def attend_cache(self, q, k, v, mask, k_cache, v_cache, position):
        """Write the new k and v at `position` (B, T), then let q see the cache through `mask` (B, 1, T, S)."""
        row = torch.arange(len(q), device=q.device)[:, None]
        k_cache[row, :, position] = k.transpose(1, 2).to(k_cache.dtype)
        v_cache[row, :, position] = v.transpose(1, 2).to(v_cache.dtype)
        size = mask.shape[-1]
        k, v = k_cache[:, :, :size], v_cache[:, :, :size]
        if q.shape[2] > 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        if len(q) > 1 and torch.compiler.is_compiling():
            from torch.nn.attention.flex_attention import flex_attention
            return flex_attention(q, k, v, enable_gqa=True, score_mod=lambda score, b, h, i, j: torch.where(j <= position[b, 0], score, float("-inf")))
        # One query: the heads of a group become the rows of one small query matrix, so that k and v
        # are read once and never repeated
        grouped = q.view(len(q), self.n_kv_head, -1, self.head_width)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view_as(q)


def document_mask(idx, flex=False):
    """What each token may see: tokens of its own document, up to itself. A document ends with its <|endoftext|>.

    idx: (B, T). Returns a bool tensor (B, 1, T, T), True where attention is allowed; with flex=True a
    BlockMask for flex_attention, whose kernel skips what is masked and is quick only if compiled.
    It is made outside the compiled model: inside, torch 2.11 fails to compile the validation.
    """
    B, T = idx.shape
    ends = (idx == END_OF_TEXT).int()
    document = ends.cumsum(1) - ends
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b, h, q, k):
            return (q >= k) & (document[b, q] == document[b, k])
        return torch.compile(create_block_mask, dynamic=False)(visible, B, None, T, T, device=idx.device)
    causal = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
    return (causal & (document[:, :, None] == document[:, None, :]))[:, None]


def attend(q, k, v, mask):
    """Causal attention, q (B, H, T, hd), k and v (B, H_kv, T, hd); `mask` as document_mask gives it."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    from torch.nn.attention.flex_attention import flex_attention
    # k is a slice; compiled without a backward pass, torch (2.11 and 2.13) loses a slice's offset
    return flex_attention(q, k.contiguous(), v, block_mask=mask, enable_gqa=True)


class FFN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.down(F.silu(self.up(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.n_embd), Attention(config)
        self.ffn_norm = RMSNorm(config.n_embd)
        self.ffn = MoE(config) if config.n_expert else FFN(config)

    def forward(self, x, rope, mask=None, cache=None):
        """(B, T, C) → (B, T, C), and of a mixture of experts (balance loss, share of rows per expert), else None."""
        x = x + self.attn(self.attn_norm(x), rope, mask, cache)
        if isinstance(self.ffn, MoE):
            y, balance, share = self.ffn(self.ffn_norm(x))
            return x + y, (balance, share)
        return x + self.ffn(self.ffn_norm(x)), None


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1, reduction="sum"), for a compiler on a GPU.

    x (N, C), weight (V, C), targets (N,) → a scalar, in nats. The gradient is worked out on the way forward, while the logits
    are at hand: one kernel reads them from memory and writes their gradient over them, in less than half of the
    instructions that F.cross_entropy takes in two. The way back only scales what was found.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        logits = x @ weight.t()
        # in powers of 2: exp2 is one instruction of a GPU, exp some five
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * LOG2_E
        targets = targets.int()[:, None]
        hit = torch.arange(len(weight), dtype=torch.int32, device=x.device) == targets
        top = wide.amax(-1, keepdim=True)
        log_sum = (wide - top).exp2().sum(-1, keepdim=True).log2() + top
        # read from the logits, not multiplied again: a compiler rounds nothing to bfloat16 in between, and what of a confident
        # model's gradient is left, 1 less than 1, would be an error of rounding
        at = torch.where(hit, wide, 0).sum(-1, keepdim=True)
        loss = torch.where(targets >= 0, log_sum - at, float("inf"))
        # loss + at is log_sum again, or infinite where nothing is learned. Written so, the compiler sees that nobody needs
        # the logits afterwards, and reuses their memory
        grad = ((wide - (loss + at)).exp2() - hit.to(wide.dtype)).to(x.dtype)
        ctx.save_for_backward(grad @ weight, grad.t() @ x)
        return torch.where(targets >= 0, loss, 0).sum() / LOG2_E

    @staticmethod
    def backward(ctx, scale):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * scale, grad_weight * scale, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        # not trained and not saved: it follows from the config
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.tokenizer = self.step = None        # from_checkpoint sets them
        self._chat_cache = None                  # of the last `chat`
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            # 2 * n_layer sub-layers add to the residual stream; so scaled, its variance stays near 1 (GPT-2)
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx, targets=None, mask=None):
        """idx: (B, T) token ids, T up to block_size.

        With targets (B, T), -1 where nothing is learned: the *sum* of the cross-entropies in nats (the
        caller divides by the number of learned tokens of the whole step), and for a mixture of experts
        (balance loss averaged over layers, share of rows (n_layer, n_expert)), for a dense model None.
        Without targets: logits (B, T, vocab_size). mask: of document_mask, to keep attention inside a document.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} tokens do not fit into block_size={self.config.block_size}")
        x, moe = self.trunk(idx, self.rope[:, : idx.shape[1], None], mask)
        if targets is None:
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()
        # float16 could not hold a gradient that is not divided by the number of tokens yet
        if torch.compiler.is_compiling() and x.is_cuda and torch.is_grad_enabled() and x.dtype != torch.float16:
            return LinearCrossEntropy.apply(x, self.wte.weight.to(x.dtype), targets), moe
        logits = self.logits(x)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum"), moe

    def logits_and_stats(self, idx, mask=None):
        """(B, T) → logits (B, T, vocab_size) and what `forward` says of a mixture of experts."""
        x, moe = self.trunk(idx, self.rope[:, : idx.shape[1], None], mask)
        return self.logits(x), moe

    def trunk(self, idx, rope, mask=None, cache=None):
        """Embedding, blocks and the last norm. cache: (KVCache, position)."""
        x = F.dropout(self.wte(idx), self.config.dropout, self.training)
        if torch.is_autocast_enabled(idx.device.type):
            # The residual stream in bf16 too: it is half the memory traffic of everything element-wise
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        moe = []
        for i, block in enumerate(self.blocks):
            x, stats = block(x, rope, mask, cache and (cache[0].k[i], cache[0].v[i], cache[1]))
            moe.append(stats)
        if moe[0] is not None:
            moe = (torch.stack([balance for balance, _ in moe]).mean(), torch.stack([share for _, share in moe]))
        return self.norm(x), moe if isinstance(moe, tuple) else None

    def logits(self, x):
        return F.linear(x, self.wte.weight)

    def n_params(self):
        """(all parameters, those that one token passes through)."""
        total = sum(p.numel() for p in self.parameters())
        idle = 1 - self.config.n_expert_per_tok / self.config.n_expert if self.config.n_expert else 0
        experts = sum(p.numel() for m in self.modules() if isinstance(m, MoE) for p in (m.w1_EDF, m.w2_EFD))
        return total, total - round(idle * experts)

    def flops_per_token(self, length):
        """Of one training step: 6 × active matmul parameters (the tied head once) + causal attention."""
        matmul = self.n_params()[1] - sum(p.numel() for p in self.parameters() if p.dim() < 2)
        return 6 * matmul + 6 * self.config.n_layer * length * self.config.n_embd

    @classmethod
    def from_checkpoint(cls, folder, device="auto", dtype="auto", which="newest"):
        """The model that train.py left in `folder`, ready to generate, its tokenizer as `.tokenizer`.

        device "auto": the GPU if there is one. dtype "auto": bfloat16 where the device computes in it,
        else float32. which: "newest" or "best" (by validation loss). On the CPU in float32 the weights
        stay in the file, mapped, until they are read. `.step`: how long it was trained.
        Raises UserError if the folder holds no readable checkpoint, or a tokenizer that isn't its own.

            model = GPT.from_checkpoint("out/demo_sft", device="cpu")
            model.chat([{"role": "user", "content": "你好"}], max_new_tokens=64, temperature=0)
        """
        from minillm.checkpoint import load_for_inference
        from minillm.device import pick_device
        from minillm.tokenizer import Tokenizer
        device = pick_device(device)
        dtype = generation_dtype(dtype, device)
        saved = load_for_inference(folder, which)
        tokenizer = Tokenizer.load(saved["tokenizer_dir"])
        if tokenizer.hash != saved.get("tokenizer_hash", tokenizer.hash):
            raise UserError(f"{saved['tokenizer_dir']} is not the tokenizer that the model in {folder} was trained with")
        with _Uninitialized():                   # neither memory nor random numbers for weights that come from the file
            model = cls(GPTConfig(**saved["model_config"]))
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, its model {model.config.vocab_size}")
        model.load_state_dict(saved["model"], assign=True)
        model.rope = rope_table(model.config)
        model.tokenizer, model.step = tokenizer, saved["step"]
        return model.for_generation(device, dtype)

    def for_generation(self, device, dtype):
        """Move the model to `device`, its matrices in `dtype`, to be used and not trained. Returns it."""
        self.requires_grad_(False).eval()
        for name, parameter in self.named_parameters():
            # norms and router compute in float32, so their few weights stay in it
            parameter.data = parameter.data.to(device, torch.float32 if "norm" in name or "router" in name else dtype)
        self.rope = self.rope.to(device)
        for block in self.blocks:
            if isinstance(block.ffn, MoE) and (device.type == "cuda" or dtype != torch.float32):
                block.ffn.lay_out_for_decoding()
        return self

    def new_cache(self, batch=1, size=0):
        """An empty KVCache for `batch` rows of `size` tokens (0: block_size)."""
        return KVCache(self, batch, size)

    def generate(self, prompts, max_new_tokens=256, **options):
        """Continue one prompt (a list of ids: yields ids) or several (a list of lists: yields, for each
        step, a list with every row's id, None once that row has ended).

        Options, with their defaults: temperature=1.0 (0: greedy), top_k=0, top_p=1.0,
        repetition_penalty=1.0, seed=0, stop_ids=(), cache=None, compile=False; see `generate` below.

            text = model.tokenizer.decode(model.generate(model.tokenizer.encode("从前"), 20, top_k=5))
        """
        single = not prompts or not isinstance(prompts[0], (list, tuple))
        for row in generate(self, [prompts] if single else prompts, max_new_tokens, **options):
            yield row[0] if single else row

    def chat(self, messages, stream=False, max_new_tokens=256, temperature=0.8, top_k=50, top_p=1.0,
             repetition_penalty=1.0, seed=None, stop=(), compile=False):
        """Answer a conversation: the text, or with stream=True an iterator over its pieces.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, ...], the last one from the
        user. temperature 0 is greedy; seed None draws another answer each time; stop: a string, or
        several, before which the answer ends. If the conversation is longer than the context, its oldest
        exchanges are left out. What this call shares with the one before is still in the cache and not
        computed again. Raises UserError for messages that cannot be answered.

            messages = [{"role": "user", "content": "你好"}]
            answer = model.chat(messages, max_new_tokens=32, top_k=5, seed=1)
            pieces = list(model.chat(messages, max_new_tokens=32, top_k=5, seed=1, stream=True))
            assert "".join(pieces) == answer
        """
        from minillm.conversation import Conversation, check_messages, check_sampling
        check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
        check_messages(messages)
        if not messages or messages[-1]["role"] != "user":
            raise UserError("the last message must be the user's")
        # taken out while in use: a second stream beside this one makes a cache of its own
        cache, self._chat_cache = self._chat_cache or self.new_cache(), None
        conversation = Conversation(self, cache=cache)
        if messages[0]["role"] == "system":
            conversation.set_system(messages[0]["content"])
            messages = messages[1:]
        for message in messages[:-1]:
            conversation.add(message["role"], message["content"])
        pieces = conversation.ask(messages[-1]["content"], max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                                  repetition_penalty=repetition_penalty, seed=seed, compile=compile,
                                  stop=(stop,) if isinstance(stop, str) else stop)

        def texts():
            try:
                yield from (piece for piece in pieces if piece)
            finally:
                self._chat_cache = cache
        return texts() if stream else "".join(texts())


# ---------------------------------------------------------------------------------------------------
# Generation. Free functions over a model and a cache: prefill reads the prompt, decode_step makes one
# token, entirely on the device and with fixed shapes, so that a CUDA graph can hold all of it.


def generation_dtype(name, device):
    """The torch.dtype of "auto", "float32", "bfloat16", "float16" or a torch.dtype, for weights that are only read.

    Making one token reads every weight once, so half the bytes are half the time, but for a CPU that
    has no instructions for bfloat16.
    """
    from minillm.device import pick_dtype
    return name if isinstance(name, torch.dtype) else pick_dtype(name, device)


class _Uninitialized(torch.overrides.TorchFunctionMode):
    """Under it nothing is drawn at random, so the memory behind new weights is never touched and never taken.

    (The meta device has no memory at all, but the first operation on it imports sympy and torch._dynamo: 0.8 s.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


class KVCache:
    """Keys and values of every token so far: k[layer] and v[layer], (B, n_kv_head, slots, head width). Where `keys` and `values`
    are there too, these are all layers' in one tensor, (n_layer, B, …), and k and v are views of them.

    tokens[b] lists the ids of row b that are in the cache. Slot `size`, after the last token's, is for padding: it
    is written, and what is read of it counts for nothing. prefilled counts the prompt tokens that had to be computed.
    """

    def __init__(self, model, batch=1, size=0):
        c = model.config
        self.size = min(size or c.block_size, c.block_size)
        # a multiple of 16 slots, so that a GPU reads 16 bytes at a time
        shape = (batch, c.n_kv_head, self.size // 16 * 16 + 16, c.n_embd // c.n_head)
        weight = model.wte.weight
        if weight.is_cuda and batch > 1:
            # one tensor a layer: a compiled step then writes each in place instead of copying all of them
            self.k, self.v = ([weight.new_zeros(shape) for _ in range(c.n_layer)] for _ in "kv")
        else:
            # one tensor for all layers, which decode_one_row_compiled writes at once
            self.keys, self.values = (weight.new_zeros(c.n_layer, *shape) for _ in "kv")
            if weight.is_cuda:
                # attention sums v over its slots, so they lie side by side: 1.09 times the tokens a second, in a batch fewer
                self.values = self.values.transpose(3, 4).contiguous().transpose(3, 4)
            self.k, self.v = ([whole[i] for i in range(c.n_layer)] for whole in (self.keys, self.values))
        self.tokens = [[] for _ in range(batch)]
        self.prefilled = 0
        self.loops = {}                          # the state of decoding, and what was captured over these buffers


def cached_forward(model, cache, idx, position, end):
    """idx, position: (B, n), the place of each token (cache.size: padding). Sees slots below `end`. → (B, n, C)."""
    mask = (torch.arange(end, device=idx.device) <= position[:, :, None])[:, None]
    rope = model.rope[:, position.clamp(max=cache.size - 1)][:, :, :, None]
    return model.trunk(idx, rope, mask, (cache, position))[0]


def prefill(model, cache, prompts):
    """Bring the cache to hold exactly `prompts` (lists of ids, one a row) and return the logits (B, V)
    that follow each. What a row shares with the cache's tokens is kept and not computed again."""
    device = model.wte.weight.device
    starts = []
    for prompt, old in zip(prompts, cache.tokens):
        same = 0
        while same < min(len(prompt) - 1, len(old)) and prompt[same] == old[same]:
            same += 1
        starts.append(same)
    # should this be interrupted: from here on the old tokens' slots are overwritten
    cache.tokens = [list(prompt[:start]) for prompt, start in zip(prompts, starts)]
    width = max(len(p) - s for p, s in zip(prompts, starts))
    rounded = 1 << (width - 1).bit_length()      # few different widths, since each is captured once
    # many tokens go through grouped_mm, which may ask the host for its offsets, and no graph can hold that
    in_graph = device.type == "cuda" and (not model.config.n_expert or len(prompts) * rounded <= ALL_EXPERTS_TOKENS)
    if in_graph:
        width = rounded
    idx = torch.zeros(len(prompts), width, dtype=torch.long)
    position = torch.full_like(idx, cache.size)
    for b, (prompt, start) in enumerate(zip(prompts, starts)):
        idx[b, : len(prompt) - start] = torch.tensor(prompt[start:])
        position[b, : len(prompt) - start] = torch.arange(start, len(prompt))
    if in_graph:
        # the whole cache for a single row, whose prompts grow from turn to turn: a graph less each time, and it is as quick
        end = cache.size if len(prompts) == 1 else min(1 << (max(map(len, prompts)) - 1).bit_length(), cache.size)
        x = captured_forward(model, cache, idx, position, end)
    else:
        x = cached_forward(model, cache, idx.to(device), position.to(device), max(map(len, prompts)))
    cache.tokens = [list(prompt) for prompt in prompts]
    cache.prefilled += sum(map(len, prompts)) - sum(starts)
    last = torch.tensor([len(p) - s - 1 for p, s in zip(prompts, starts)], device=device)
    return model.logits(x[torch.arange(len(prompts), device=device), last])


def captured_forward(model, cache, idx, position, end):
    """cached_forward, idx and position still on the host, as a CUDA graph, kept in the cache.

    Launched one by one, its 750 operations keep the device waiting for the host: 10 ms and more for 12 layers.
    """
    key = "prefill", idx.shape[1], end
    if key not in cache.loops:
        buffers = idx.to(model.wte.weight.device), position.to(model.wte.weight.device)
        cache.loops[key] = *buffers, *capture(lambda: cached_forward(model, cache, *buffers, end))
    idx_buffer, position_buffer, replay, x = cache.loops[key]
    idx_buffer.copy_(idx)
    position_buffer.copy_(position)
    replay()
    return x


def decode_one_token(model, cache, token, position, end):
    """token, position: (B, 1) → logits (B, V) of what follows."""
    if len(token) == 1 and not token.is_cuda:
        return decode_one_row(model, cache, token.item(), end - 1)
    if len(token) == 1 and torch.compiler.is_compiling():
        return decode_one_row_compiled(model, cache, token, position)
    # flex_attention captures the position: it would else be worked out within it, and without its dependencies
    return model.logits(cached_forward(model, cache, token, in_memory(position), end)[:, -1])


class DecodeState:
    """What a decode loop carries from token to token, on the device: buffers that never move."""

    def __init__(self, model, batch, steps):
        device = model.wte.weight.device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.prompt_length = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.u = torch.zeros(batch, steps, device=device)
        # an embedding with more rows than the tokenizer has tokens must not draw one of the others
        vocab_size = model.tokenizer.vocab_size if model.tokenizer else model.config.vocab_size
        self.seen = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device)


def choose(state, logits, temperature, top_k, top_p, repetition_penalty):
    """The next token of every row from its logits (B, V): into state.token; state.step moves on."""
    logits = logits[:, : state.seen.shape[1]]
    if repetition_penalty != 1:                  # CTRL, arXiv 1909.05858
        damped = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(state.seen, damped, logits)
    u = state.u.index_select(1, state.step)[:, 0]
    state.token.copy_(sample(logits, u, temperature, top_k, top_p)[:, None])
    if repetition_penalty != 1:
        state.seen.scatter_(1, state.token, True)
    state.step += 1


def decode_step(model, cache, state, end, options):
    """One token more for every row, in place. Reads nothing back to the host."""
    # `step` counts the token that is read here; a row that has run to the end of the cache goes on writing to the padding slot
    position = (state.prompt_length + state.step - 1).clamp(max=cache.size)
    choose(state, decode_one_token(model, cache, state.token, position, end), *options)


def capture(step):
    """Record `step` (a function without arguments over fixed buffers) in a CUDA graph, after two calls to
    warm up. Returns its replay, and where that leaves what `step` returns."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


@torch.inference_mode()
def generate(model, prompts, max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
             seed=0, stop_ids=(), cache=None, compile=False):
    """Yield, for each step, the list of the rows' new ids; None for a row that has ended.

    prompts: B non-empty lists of ids. A row ends after max_new_tokens, with an id of stop_ids (which is
    yielded), or at the end of the cache. Row b draws from seed + b. Pass the same cache again to go on
    with a conversation: the common beginning is not computed twice. Ids of stop_ids are exempt from the
    repetition penalty, which takes ids of the prompt and of the answer alike.
    Raises UserError if a prompt leaves no room in the context, or for an option out of range.
    """
    from minillm.conversation import check_sampling
    check_sampling(max(max_new_tokens, 1), temperature, top_k, top_p, repetition_penalty)
    # few different sizes, since each is captured and compiled by itself
    cache = cache or KVCache(model, len(prompts), -(-(max(map(len, prompts)) + max_new_tokens) // 256) * 256)
    if len(cache.tokens) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but the cache has {len(cache.tokens)} rows")
    for prompt in prompts:
        if not 0 < len(prompt) < cache.size:
            raise UserError(f"a prompt of {len(prompt)} tokens does not fit: the context holds {cache.size}, "
                            "and at least one token goes in and one comes out")
    if max_new_tokens < 1:
        return
    options = (temperature, top_k, top_p, repetition_penalty)
    cuda = model.wte.weight.is_cuda
    if "state" not in cache.loops:
        cache.loops["state"] = DecodeState(model, len(prompts), cache.size)
    state = cache.loops["state"]
    steps = min(max_new_tokens, cache.size)
    generators = (torch.Generator().manual_seed((seed + b) % 2**63) for b in range(len(prompts)))
    state.u[:, :steps].copy_(torch.stack([torch.rand(steps, generator=generator) for generator in generators]))
    if repetition_penalty != 1:
        seen = torch.zeros(state.seen.shape, dtype=torch.bool)           # on the host, then one transfer
        for row, prompt in zip(seen, prompts):
            row[list(prompt)] = True
            row[list(stop_ids)] = False
        state.seen.copy_(seen)
    state.step.zero_()
    state.prompt_length.copy_(torch.tensor([[len(p)] for p in prompts]))
    choose(state, prefill(model, cache, prompts), *options)

    longest = max(map(len, prompts))
    # a row a step: into a column, PyTorch would copy by way of memory that is not pinned, and wait
    host = torch.empty(steps, len(prompts), dtype=torch.long, pin_memory=cuda)
    rooms = [min(steps, cache.size - len(prompt)) for prompt in prompts]
    if cuda:
        done = [torch.cuda.Event() for _ in range(steps)]
        if max(rooms) > 1:
            step = cache.loops.get((compile, *options)) or captured_loop(model, cache, state, options, compile)
    ended = [False] * len(prompts)
    for t in range(max(rooms)):
        if cuda:
            # the device is always one token ahead of what the host has read
            if t == 0:
                host[0].copy_(state.token[:, 0], non_blocking=True)
                done[0].record()
            if t + 1 < max(rooms):
                step()
                host[t + 1].copy_(state.token[:, 0], non_blocking=True)
                done[t + 1].record()
            done[t].synchronize()
        else:
            if t > 0:
                decode_step(model, cache, state, min(longest + t, cache.size), options)
            host[t] = state.token[:, 0]
        row, new = [], host[t].tolist()
        for b, token in enumerate(new):
            row.append(None if ended[b] else token)
            if not ended[b]:
                if t > 0:
                    cache.tokens[b].append(old[b])       # its k and v were written by this step
                ended[b] = token in stop_ids or t + 1 >= rooms[b]
        old = new
        yield row
        if all(ended):
            return


# realize_acc_reads_threshold: a sum over the chosen experts is one kernel, however many weights it reads
DECODE_OPTIONS = {"coordinate_descent_tuning": True, "combo_kernels": True, "combo_kernels_pointwise_only": True, "realize_acc_reads_threshold": 1000, "use_fast_math": True}


def captured_loop(model, cache, state, options, compile):
    """decode_step over these buffers as one CUDA graph, kept in the cache. It is run twice before, to warm up: that leaves keys
    and values behind the prompt, which are written again before they are read."""
    function = torch.compile(decode_step, fullgraph=True, options=DECODE_OPTIONS) if compile else decode_step
    keep = state.token.clone(), state.step.clone(), state.seen.clone()
    loop, _ = capture(lambda: function(model, cache, state, cache.size, options))
    for buffer, value in zip((state.token, state.step, state.seen), keep):
        buffer.copy_(value)
    cache.loops[compile, *options] = loop
    return loop
