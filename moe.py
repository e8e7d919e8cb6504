"""The sparse feed-forward layer (MoE): a noisy top-k router, experts, a load-balancing loss.

`MoE(config)` stands where the dense FFN stands in model.py. Each token visits n_expert_per_tok of
the n_expert experts; every expert is the dense model's two-layer SiLU FFN. No expert has a capacity
limit, so no token is dropped, and no shape depends on the data: the layer compiles with
fullgraph=True and never makes the host wait for the device.

The loop over experts below is plain and multiplies every token with every expert. GPT.use_fast and
GPT.from_checkpoint put its twin in its place, minillm/speed/grouped_mm.py.

Shape suffixes:  T tokens of the batch · D n_embd · E n_expert · K n_expert_per_tok · F n_inner

Paper: noisy top-k gating, Shazeer et al. 2017 (arXiv 1701.06538).
"""
import torch
import torch.nn as nn
from torch.nn import functional as F


def top_experts(logits_TE, k):
    """The indices (T, K) of each token's k experts with the largest logits."""
    return logits_TE.topk(k, dim=1).indices


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

    def forward(self, x_TD):
        """(T, D) → the gates (T, K) of the chosen experts, and their indices (T, K)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            if x_TD.dtype != torch.float64:
                x_TD = x_TD.float()
            if self.training:
                logits_TE = self.noisy_logits(x_TD)
            else:
                logits_TE = x_TD @ self.weight_DE.to(x_TD.dtype)
            expert_TK = self.top_experts(logits_TE, self.k)
            if self.k == 1:
                # a softmax over the one chosen logit is always 1, without a gradient for the router
                return logits_TE.softmax(dim=1).gather(1, expert_TK), expert_TK
            return logits_TE.gather(1, expert_TK).softmax(dim=1), expert_TK

    def noisy_logits(self, x_TD):
        """x·W_g + N(0,1) · softplus(x·W_noise): (T, E). One matmul for both maps reads x once."""
        both_DE = torch.cat((self.weight_DE, self.noise_DE), dim=1).to(x_TD.dtype)
        clean_TE, noise_std_TE = (x_TD @ both_DE).chunk(2, dim=1)
        return clean_TE + torch.randn_like(clean_TE) * F.softplus(noise_std_TE)


def balance_loss(gate_TK, expert_TK, n_expert):
    """The load-balancing loss, KL(uniform ‖ mean gate over the tokens), a scalar.

    0 when every expert carries the same gate weight. A statistic of the batch, not of a token. It
    is neither Shazeer's CV² of the gates (a variance) nor Switch's f·P (share of tokens times mean
    gate): -log grows steeply as an expert's mean gate nears 0, so one that is about to be left
    without tokens is pulled back the hardest. One that no token chose has a mean gate of 0; the
    floor of 1e-6 keeps its term finite (then the pressure comes from the experts that were chosen).
    """
    one_hot_TKE = F.one_hot(expert_TK, n_expert).to(gate_TK.dtype)
    mean_E = (gate_TK[:, :, None] * one_hot_TKE).sum(1).mean(0)
    if gate_TK.shape[1] == 1:
        mean_E = mean_E / mean_E.sum()           # the gates of single experts do not sum to 1
    return -(mean_E.clamp_min(1e-6) * n_expert).log().mean()


def loop_over_experts(x_TD, gate_TK, expert_TK, w1_EDF, w2_EFD):
    """Every token through every expert; a gate is 0 where the expert was not chosen. → (T, D)"""
    gate_TE = gate_TK.new_zeros(len(x_TD), len(w1_EDF)).scatter(1, expert_TK, gate_TK)
    y_TD = torch.zeros_like(x_TD)
    for expert, (w1_DF, w2_FD) in enumerate(zip(w1_EDF, w2_EFD)):
        h_TF = F.silu(x_TD @ w1_DF.to(x_TD.dtype))
        # the gates are float32, and so is the sum from the first expert on
        y_TD = y_TD + gate_TE[:, expert, None] * (h_TF @ w2_FD.to(x_TD.dtype))
    return y_TD.to(x_TD.dtype)


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
        """(B, T, D) → the same shape, the load-balancing loss (scalar), each expert's load (E,).

        The load is the share of (token, expert) pairs that an expert got; the loads sum to 1.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        gate_TK, expert_TK = self.router(x_TD)
        y_TD = self.experts(x_TD, gate_TK, expert_TK, self.w1_EDF, self.w2_EFD)
        load_E = F.one_hot(expert_TK, self.n_expert).sum((0, 1)) / expert_TK.numel()
        balance = balance_loss(gate_TK, expert_TK, self.n_expert)
        return self.dropout(y_TD).view_as(x), balance, load_E.detach()
