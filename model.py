"""The decoder-only transformer: configuration, layers, loss, and a trained model in use.

    model = GPT(GPTConfig(n_layer=12))
    loss_sum, moe_stats = model(idx, targets)        # training
    model = GPT.from_checkpoint("out/demo_sft")      # using a trained one
    model.chat([{"role": "user", "content": "你好"}])

Pre-norm blocks (norm → sub-layer → residual): RMSNorm, attention with RoPE and grouped queries
(GQA), a two-layer SiLU FFN or the experts of moe.py; the output projection is the embedding. With
12 layers of width 1024, 16 query and 8 key/value heads and 32,000 tokens: 171M parameters.

This is the plain model. `use_fast` (training) and `from_checkpoint` swap in fast versions of
minillm/speed, which give the same numbers; one that no longer does after a change here is left out.

Papers: RMSNorm arXiv 1910.07467, RoPE 2104.09864, GQA 2305.13245, tied embeddings 1608.05859.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from minillm import checkpoint
from minillm.attention import apply_rope, causal_attention, rope_table
from minillm.conversation import chat
from minillm.device import pick_device, pick_dtype
from minillm.errors import UserError
from minillm.generation import KVCache, generate, round_up
from minillm.same_function import check_attention
from minillm.sampling_params import SamplingParams
from moe import MoE, over_layers

try:
    from minillm.speed import fast_versions
except ImportError:                              # minillm/speed was deleted
    fast_versions = None


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
    init_std = 0.02              # of fresh weights, before minillm/init.py; untyped, so no field

    def __post_init__(self):
        """Fill in n_inner. Raises UserError on sizes that do not fit together."""
        self.n_inner = self.n_inner or 4 * self.n_embd
        for name in "block_size vocab_size n_layer n_head n_kv_head n_embd n_inner".split():
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        head_dim = self.n_embd // self.n_head
        if head_dim % 2:
            raise UserError(f"n_embd/n_head={head_dim} must be even: RoPE turns pairs of channels")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be in [0, 1)")
        if not self.n_expert:
            return
        if not 1 <= self.n_expert_per_tok <= self.n_expert <= 256:
            raise UserError(f"n_expert_per_tok={self.n_expert_per_tok} must be between 1 and "
                            f"n_expert={self.n_expert}, and that at most 256")
        if self.n_embd % 8 or self.n_inner % 8:
            raise UserError(f"n_embd={self.n_embd} and n_inner={self.n_inner} must be multiples "
                            "of 8 with experts: their matmul reads 16 bytes at a time")
        if self.bias:
            raise UserError("bias=True is not offered with experts (n_expert > 0)")


class RMSNorm(nn.Module):
    eps = 1e-6

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        # the mean square of a bf16 row is computed in float32
        row = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(row, self.weight.shape, self.weight.to(row.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.dropout = config.dropout
        # q, k and v in one matrix: one larger matmul instead of three
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * self.head_dim, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope, attend):
        """x: (B, T, D) → (B, T, D). attend(q, k, v): the attention; the result has q's shape."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q = apply_rope(q, rope).transpose(1, 2)          # (B, n_head, T, head_dim)
        k = apply_rope(k, rope).transpose(1, 2)          # (B, n_kv_head, T, head_dim)
        # v is copied: autograd would keep all of qkv in memory for a slice
        v = v.contiguous().transpose(1, 2)               # (B, n_kv_head, T, head_dim)
        y = attend(q, k, v)                              # (B, n_head, T, head_dim)
        y = self.proj(y.transpose(1, 2).reshape(B, T, D))
        return F.dropout(y, self.dropout, self.training)


class FFN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """(B, T, D) → (B, T, D), and None where MoE returns its statistics."""
        return self.dropout(self.down(F.silu(self.up(x)))), None


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.n_embd), Attention(config)
        self.ffn_norm = RMSNorm(config.n_embd)
        self.ffn = MoE(config) if config.n_expert else FFN(config)

    def forward(self, x, rope, attend):
        """(B, T, D) → (B, T, D), and the experts' (load-balancing loss, load), or None."""
        x = x + self.attn(self.attn_norm(x), rope, attend)
        y, stats = self.ffn(self.ffn_norm(x))
        return x + y, stats


def cross_entropy(x, weight, targets):
    """The summed cross-entropy, nats. x: (N, D), weight: (V, D), targets: (N,); -1 is no target."""
    logits = F.linear(x, weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        # not trained and not saved: it follows from the config
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.cross_entropy = cross_entropy
        self.over_layers = over_layers           # an attribute for minillm/speed/parts.py
        self.tokenizer = self.step = self._chat_cache = None     # for from_checkpoint and chat
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.init_std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            # 2 * n_layer sub-layers add to the residual stream; dividing their std by
            # sqrt(2 * n_layer) keeps its growth independent of depth (GPT-2)
            if name.endswith((".attn.proj.weight", ".ffn.down.weight")):
                nn.init.normal_(parameter, std=config.init_std / (2 * config.n_layer) ** 0.5)

    def forward(self, idx, targets=None, attn_mask=None):
        """idx: (B, T) token ids, T up to block_size. attn_mask: attention.document_mask(), or None.

        Without targets: the logits (B, T, V). With targets (B, T), -1 for none, a pair: the *sum*
        of the cross-entropies in nats, which the caller divides by the step's number of targets;
        and the experts' statistics, as moe.over_layers returns them (None: no experts).
        """
        x, stats = self.hidden(idx, attn_mask)
        if targets is None:
            return self.logits(x)
        return self.cross_entropy(x.flatten(0, 1), self.wte.weight, targets.flatten()), stats

    def hidden(self, idx, attn_mask=None):
        """(B, T) → the output of the last norm (B, T, D), and the experts' statistics."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")

        def attend(q, k, v, layer):              # layer: decoding needs it for its cache
            return causal_attention(q, k, v, attn_mask)
        return self.trunk(idx, self.rope[:, :T, None], attend)

    def trunk(self, idx, rope, attend):
        """Embedding, blocks and the last norm. attend(q, k, v, layer): one layer's attention."""
        x = self.embed(idx)
        stats = []
        for layer, block in enumerate(self.blocks):
            x, stat = block(x, rope, partial(attend, layer=layer))
            stats.append(stat)
        return self.norm(x), self.over_layers(stats)

    def embed(self, idx):
        """(B, T) → (B, T, D), the start of the residual stream."""
        x = F.dropout(self.wte(idx), self.config.dropout, self.training)
        if torch.is_autocast_enabled(idx.device.type):
            # the residual stream in bf16 too: half the memory traffic of everything element-wise
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        return x

    def logits(self, x):
        """(…, D) → (…, V). Training does not call it: cross_entropy has this product inside."""
        return F.linear(x, self.wte.weight)

    def use_fast(self, compiled=False):
        """Swap in the fast versions for training, which give the same numbers. Returns the model.

        Call it once the model is on its device, before torch.compile. compiled: whether it will be.
        """
        if fast_versions:
            fast_versions.use_for_training(self, compiled)
        return self

    def n_params(self):
        """(all parameters, those that one token passes through). Experts: an MoE's (E, in, out)."""
        total, idle = sum(p.numel() for p in self.parameters()), 0
        for moe in {moe for _, moe in self.moe_layers()}:
            experts = sum(p.numel() for p in moe.parameters() if p.dim() == 3)
            idle += round(experts * (1 - moe.k / moe.n_expert))
        return total, total - idle

    def moe_layers(self):
        """Yields (number of the layer, its MoE): of all layers, of some, or of none."""
        for layer, block in enumerate(self.blocks):
            yield from ((layer, module) for module in block.modules() if isinstance(module, MoE))

    def flops_per_token(self, length):
        """FLOPs of a training step per token, in sequences of `length` tokens."""
        # 6 = 2 (multiply, add) * 3 (forward, gradients of input and weights). Attention: two such
        # products (q·k, weights·v) of n_embd numbers, with the length / 2 tokens seen on average
        matmul = self.n_params()[1] - sum(p.numel() for p in self.parameters() if p.dim() < 2)
        return 6 * matmul + 6 * self.config.n_layer * length * self.config.n_embd

    # ---- a trained model in use

    @classmethod
    def from_checkpoint(cls, folder, device="auto", dtype="auto", which="newest", check=False):
        """The model that train.py left in `folder`, ready to generate, with .tokenizer and .step.

        device "auto": the GPU if there is one. dtype "auto": bfloat16 where the device computes in
        it, float16 on older GPUs, else float32; or a torch.dtype. which: "newest", "best" (by
        validation loss) or a step. check: find flipped bits, 1 s per GB. On the CPU in float32 the
        weights stay in the mapped file until used. Raises UserError if `folder` holds no model.

            model = GPT.from_checkpoint("out/demo_sft", device="cpu")
            model.chat([{"role": "user", "content": "你好"}], max_new_tokens=64, temperature=0)
        """
        device = pick_device(device)
        dtype = dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype, device)
        saved = checkpoint.load_for_inference(folder, which, check)
        with checkpoint.skip_init():             # the weights come from the file
            model = cls(checkpoint.model_config(saved, GPTConfig))
        checkpoint.load_weights(model, saved, assign=True)
        model.tokenizer = checkpoint.load_tokenizer(saved, folder, model.config.vocab_size)
        model.step = saved["step"]
        return model.for_generation(device, dtype)

    def for_generation(self, device, dtype):
        """Prepare the model for inference: on `device`, matrices in `dtype`. Returns the model."""
        self.requires_grad_(False).eval()
        for name, parameter in self.named_parameters():
            # norms and router compute in float32, so their few weights stay in it
            in_float32 = "norm" in name or "router" in name
            parameter.data = parameter.data.to(device, torch.float32 if in_float32 else dtype)
        self.to(device)                          # rope, and the buffers of a changed model
        check_attention(self)
        if fast_versions:
            fast_versions.use_for_generation(self)
        return self

    def new_cache(self, batch=1, size=0):
        """An empty KVCache for `batch` rows of `size` tokens (0: block_size)."""
        cache_type = fast_versions.cache_type(self) if fast_versions else KVCache
        return cache_type(self, batch, size)

    def generate(self, prompts, max_new_tokens=256, seed=0, stop_ids=(), cache=None, compile=False,
                 **sampling):
        """Continue one prompt, or several at once.

        One prompt (a list of ids): yields ids. Several (a list of lists): yields, for each step, a
        list with every row's id, None once that row has ended. sampling, with its defaults:
        temperature=1.0 (0: greedy), top_k=0, top_p=1.0, repetition_penalty=1.0; see SamplingParams,
        and generation.generate for the rest.

            text = model.tokenizer.decode(model.generate(model.tokenizer.encode("从前"), 20, top_k=5))
        """
        single = not prompts or not isinstance(prompts[0], (list, tuple))
        if single:
            prompts = [prompts]
        params = SamplingParams(max_new_tokens, **sampling)
        # cache sizes in steps of 256: each new size costs a CUDA graph, and compiling
        longest = max(map(len, prompts)) + max_new_tokens
        cache = cache or self.new_cache(len(prompts), round_up(longest, 256))
        fast = fast_versions and fast_versions.generate_arguments(self, compile)
        for row in generate(self, prompts, params, seed, stop_ids, cache, **fast or {}):
            yield row[0] if single else row

    def chat(self, messages, stream=False, **options):
        """Answer a conversation: the text, or with stream=True an iterator over its pieces.

        messages: [{"role": "system" | "user" | "assistant", "content": str}, ...], the last one
        from the user. Options, with their defaults: max_new_tokens=256, temperature=0.8 (0:
        greedy), top_k=50, top_p=1.0, repetition_penalty=1.0, seed=None (another answer each time),
        stop=() (a string, or several, before which the answer ends), compile=False. If the
        conversation is longer than the context, its oldest exchanges are left out. What two
        calls in a row have in common is computed once. Raises UserError for wrong messages.

            messages = [{"role": "user", "content": "你好"}]
            answer = model.chat(messages, max_new_tokens=32, top_k=5, seed=1)
            pieces = list(model.chat(messages, max_new_tokens=32, top_k=5, seed=1, stream=True))
            assert "".join(pieces) == answer
        """
        pieces = chat(self, messages, **options)
        return pieces if stream else "".join(pieces)
