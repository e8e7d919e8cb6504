"""The sparse feed-forward layer (MoE): a noisy top-k router, experts, a load-balancing loss.

`MoE(config)` stands where the dense FFN stands in model.py. Each token visits n_expert_per_tok of
the n_expert experts; every expert is the dense model's two-layer SiLU FFN. No expert has a capacity
limit, so no token is dropped, and no shape depends on the data: the layer compiles with
fullgraph=True and needs no GPU sync.

The loop over experts below is plain and multiplies every token with every expert. GPT.use_fast and
GPT.from_checkpoint swap in its fast version, minillm/speed/grouped_mm.py.

Shape suffixes:  N tokens of the batch · D n_embd · E n_expert · K n_expert_per_tok · F n_inner

Paper: noisy top-k gating, Shazeer et al. 2017 (arXiv 1701.06538).
"""
import torch
import torch.nn as nn
from torch.nn import functional as F


def top_experts(logits_NE, k):
    """The indices (N, K) of each token's k experts with the largest logits."""
    return logits_NE.topk(k, dim=1).indices


class Router(nn.Module):
    """Scores every expert for every token, in float32 whatever the autocast type."""

    def __init__(self, config):
        super().__init__()
        self.k = config.n_expert_per_tok
        self.weight_DE = nn.Parameter(torch.empty(config.n_embd, config.n_expert))
        # softplus(x · 0) = 0.69: at the start every logit carries noise of that standard deviation
        self.noise_DE = nn.Parameter(torch.zeros(config.n_embd, config.n_expert))
        self.top_experts = top_experts
        nn.init.normal_(self.weight_DE, std=config.init_std)

    def forward(self, x_ND):
        """(N, D) → the gates (N, K) of the chosen experts, and their indices (N, K)."""
        with torch.autocast(x_ND.device.type, enabled=False):
            if x_ND.dtype != torch.float64:
                x_ND = x_ND.float()
            if self.training:
                logits_NE = self.noisy_logits(x_ND)
            else:
                logits_NE = x_ND @ self.weight_DE.to(x_ND.dtype)
            expert_NK = self.top_experts(logits_NE, self.k)
            if self.k == 1:
                # a softmax over the one chosen logit is always 1, without a gradient for the router
                return logits_NE.softmax(dim=1).gather(1, expert_NK), expert_NK
            return logits_NE.gather(1, expert_NK).softmax(dim=1), expert_NK

    def noisy_logits(self, x_ND):
        """x·W_g + N(0,1) · softplus(x·W_noise): (N, E). One matmul for both maps reads x once."""
        both_DE = torch.cat((self.weight_DE, self.noise_DE), dim=1).to(x_ND.dtype)
        clean_NE, noise_std_NE = (x_ND @ both_DE).chunk(2, dim=1)
        return clean_NE + torch.randn_like(clean_NE) * F.softplus(noise_std_NE)


def balance_loss(gate_NK, expert_NK, n_expert):
    """The load-balancing loss, KL(uniform ‖ mean gate over the tokens): a scalar, in nats.

    It is a statistic of the batch, and 0 when all experts have the same mean gate. train.py adds it
    to the loss, times aux_loss_weight. Others use Shazeer's CV² of the gates (a variance) or
    Switch's f·P (share of tokens times mean gate). Here -log grows steeply as a mean gate nears 0,
    so an expert that is losing its last tokens is pulled back the hardest. An expert that no token
    chose has a mean gate of 0 and no gradient: only the router's noise can bring it back. The floor
    of 1e-6 keeps its term finite.
    """
    one_hot_NKE = F.one_hot(expert_NK, n_expert).to(gate_NK.dtype)
    mean_E = (gate_NK[:, :, None] * one_hot_NKE).sum(1).mean(0)
    if gate_NK.shape[1] == 1:
        mean_E = mean_E / mean_E.sum()           # the gates of single experts do not sum to 1
    return -(mean_E.clamp_min(1e-6) * n_expert).log().mean()


def loop_over_experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD):
    """Every token through every expert; a gate is 0 where the expert was not chosen. → (N, D)"""
    gate_NE = gate_NK.new_zeros(len(x_ND), len(w1_EDF)).scatter(1, expert_NK, gate_NK)
    y_ND = torch.zeros_like(x_ND)
    for expert, (w1_DF, w2_FD) in enumerate(zip(w1_EDF, w2_EFD)):
        h_NF = F.silu(x_ND @ w1_DF.to(x_ND.dtype))
        # the gates are float32, and so is the sum from the first expert on
        y_ND = y_ND + gate_NE[:, expert, None] * (h_NF @ w2_FD.to(x_ND.dtype))
    return y_ND.to(x_ND.dtype)


def over_layers(stats):
    """What MoE.forward returned of each layer, None of a dense one → the same of the whole model.

    The load-balancing loss is the mean over the MoE layers, the load (MoE layers, E). None if there
    is none.
    """
    stats = [stat for stat in stats if stat is not None]
    if not stats:
        return None
    loss, load_E = zip(*stats)
    return torch.stack(loss).mean(), torch.stack(load_E)


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_expert, self.k = config.n_expert, config.n_expert_per_tok
        self.router = Router(config)
        self.experts = loop_over_experts
        self.w1_EDF = nn.Parameter(torch.empty(config.n_expert, config.n_embd, config.n_inner))
        self.w2_EFD = nn.Parameter(torch.empty(config.n_expert, config.n_inner, config.n_embd))
        nn.init.normal_(self.w1_EDF, std=config.init_std)
        nn.init.normal_(self.w2_EFD, std=config.init_std / (2 * config.n_layer) ** 0.5)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """(B, T, D) → the same shape, and (load-balancing loss (scalar), each expert's load (E,)).

        The load is the share of (token, expert) pairs that an expert got; the loads sum to 1.
        """
        x_ND = x.reshape(-1, x.shape[-1])
        gate_NK, expert_NK = self.router(x_ND)
        y_ND = self.experts(x_ND, gate_NK, expert_NK, self.w1_EDF, self.w2_EFD)
        load_E = F.one_hot(expert_NK, self.n_expert).sum((0, 1)) / expert_NK.numel()
        loss = balance_loss(gate_NK, expert_NK, self.n_expert)
        return self.dropout(y_ND).view_as(x), (loss, load_E)
