"""Changes that people make in model.py and moe.py, each as a function of monkeypatch."""
import torch
from torch.nn import functional as F

import model as model_file
import moe
from minillm import generation
from model import FFN, GPT, Attention, Block

# kinds of tiny_model
KINDS = {
    "dense": {},
    "bias": dict(bias=True),
    "MoE": dict(n_expert=4, n_expert_per_tok=2),
    "one expert per token": dict(n_expert=4, n_expert_per_tok=1),
    "many heads and layers": dict(n_layer=6, n_head=16, n_kv_head=8, n_embd=128),
    "one head": dict(n_head=1, n_kv_head=1),
}


def relu_squared(patch):
    def forward(self, x):
        return self.dropout(self.down(F.relu(self.up(x)).square())), None
    patch.setattr(FFN, "forward", forward)


def gelu(patch):
    """Nearly SiLU, and without a parameter that a checkpoint could miss."""
    patch.setattr(FFN, "forward", lambda self, x: (self.down(F.gelu(self.up(x))), None))


def qk_norm(patch):
    def forward(self, x, rope, attend):
        normed = lambda q, k, v: attend(F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v)
        return plain(self, x, rope, normed)
    plain = Attention.forward
    patch.setattr(Attention, "forward", forward)


def window(patch):
    """Each token sees the newest 20 alone, wherever the plain code attends."""
    def causal_attention(q, k, v, mask=None):
        near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(-19)
        return plain(q, k, v, near.tril() if mask is None else near & mask)

    def cached_attention(q, k, v, visible):
        age = visible.sum(-1, keepdim=True) - visible.cumsum(-1)
        return plain_cached(q, k, v, visible & (age < 20))
    plain, plain_cached = model_file.causal_attention, generation.cached_attention
    patch.setattr(model_file, "causal_attention", causal_attention)
    patch.setattr(generation, "cached_attention", cached_attention)


def post_norm(patch):
    def forward(self, x, rope, attend):
        x = self.attn_norm(x + self.attn(x, rope, attend))
        y, stats = self.ffn(x)
        return self.ffn_norm(x + y), stats
    patch.setattr(Block, "forward", forward)


def scaled_embedding(patch):
    def trunk(self, idx, rope, attend):
        handle = self.wte.register_forward_hook(lambda module, args, x: 3 * x)
        try:
            return plain(self, idx, rope, attend)
        finally:
            handle.remove()
    plain = GPT.trunk
    patch.setattr(GPT, "trunk", trunk)


def softcap(patch):
    """Logits bounded by tanh, in generation and in the loss."""
    def cross_entropy(x, weight, targets):
        logits = 30 * (F.linear(x, weight) / 30).tanh()
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    plain = GPT.logits
    patch.setattr(GPT, "logits", lambda self, x: 30 * (plain(self, x) / 30).tanh())
    patch.setattr(model_file, "cross_entropy", cross_entropy)


def relu_squared_experts(patch):
    def loop_over_experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD):
        gate_NE = gate_NK.new_zeros(len(x_ND), len(w1_EDF)).scatter(1, expert_NK, gate_NK)
        h_ENF = F.relu(x_ND @ w1_EDF).square()
        return (gate_NE.t()[:, :, None] * (h_ENF @ w2_EFD)).sum(0)
    patch.setattr(moe, "loop_over_experts", loop_over_experts)


def sigmoid_router(patch):
    def forward(self, x_ND):
        score_NE = (x_ND @ self.weight_DE).sigmoid()
        expert_NK = self.top_experts(score_NE, self.k)
        return score_NE.gather(1, expert_NK), expert_NK
    patch.setattr(moe.Router, "forward", forward)


def other_experts(patch):
    patch.setattr(moe, "top_experts", lambda logits_NE, k: (-logits_NE).topk(k, dim=1).indices)


CHANGES = {change.__name__: change for change in (
    relu_squared, gelu, qk_norm, window, post_norm, scaled_embedding, softcap,
    relu_squared_experts, sigmoid_router, other_experts)}
# those of an MoE
EXPERTS = {relu_squared_experts, sigmoid_router, other_experts}
