"""The sparse feed-forward layer: a noisy top-k router, experts as stacked weights, a balance loss.

`MoE(config)` stands where the dense FFN stands in model.py. Each token visits n_expert_per_tok of the
n_expert experts; every expert is the dense model's two-layer SiLU FFN. No expert has a capacity
limit, so no token is dropped, and no shape depends on the data, so the whole layer compiles with
fullgraph=True and never makes the host wait for the device.

Shape suffixes:  T tokens of the batch · D n_embd · E n_expert · K n_expert_per_tok · F n_inner
                 N = T·K, one row for each (token, chosen expert) pair

Papers: noisy top-k gating, Shazeer et al. 2017 (arXiv 1701.06538); sorting tokens by expert instead of
padding them to a capacity, MegaBlocks (arXiv 2211.15841).
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from minillm.speed.fused import in_memory, product, products

# torch 2.10 made grouped_mm public; before that the same kernel had a leading underscore
_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


ALL_EXPERTS_TOKENS = 1024        # up to so many tokens, when not training on a GPU, go through all experts


class Router(nn.Module):
    """Scores every expert for every token, in float32 whatever the autocast type."""

    def __init__(self, config):
        super().__init__()
        self.k = config.n_expert_per_tok
        self.weight_DE = nn.Parameter(torch.empty(config.n_embd, config.n_expert))
        # softplus(x · 0) = 0.69: at the start every logit carries noise of that standard deviation
        self.noise_DE = nn.Parameter(torch.zeros(config.n_embd, config.n_expert))
        nn.init.normal_(self.weight_DE, std=0.02)

    def forward(self, x_TD):
        """(T, D) → gates (T, K), which sum to 1 over K, and the experts' indices (T, K)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
            if self.training:
                # one product for both maps: x is read once
                both = x_TD @ torch.cat((self.weight_DE, self.noise_DE), dim=1).to(x_TD.dtype)
                clean_TE, spread_TE = both.chunk(2, dim=1)
                logits_TE = clean_TE + torch.randn_like(clean_TE) * F.softplus(spread_TE)
            else:
                logits_TE = x_TD @ self.weight_DE.to(x_TD.dtype)
            expert_TK = torch.cat(largest(logits_TE, self.k), dim=1)
            return logits_TE.gather(1, expert_TK).softmax(dim=1), expert_TK


def largest(logits_TE, k):
    """The indices of each row's k largest values, in falling order: a list of (T, 1).

    As topk; but for a handful of experts a compiler makes one kernel of this, and topk is three.
    """
    column_E, left_TE, indices = torch.arange(logits_TE.shape[1], device=logits_TE.device), logits_TE.detach(), []
    for _ in range(k):
        indices.append(left_TE.argmax(dim=1, keepdim=True))
        left_TE = left_TE.masked_fill(column_E == indices[-1], float("-inf"))
    return indices


def balance_loss(gate_TK, expert_TK, n_expert):
    """KL(uniform ‖ mean gate over the tokens): 0 when every expert carries the same gate weight.

    A statistic of the batch, not of a token. An expert that no token chose has a mean gate of 0; the
    floor of 1e-6 keeps its term finite (then the pressure comes from the experts that were chosen).
    """
    one_hot_TKE = F.one_hot(expert_TK, n_expert).to(gate_TK.dtype)
    mean_E = (gate_TK[:, :, None] * one_hot_TKE).sum(1).mean(0)
    return -(mean_E.clamp_min(1e-6) * n_expert).log().mean()


class _Permute(torch.autograd.Function):
    """rows[index], where `index` is a permutation and `inverse` undoes it.

    Autograd would scatter-add the gradient, with atomics; of a permutation it is a gather.
    """

    @staticmethod
    def forward(ctx, rows, index, inverse):
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


class _Cast(torch.autograd.Function):
    """weight.to(dtype), once in memory: what autograd keeps for the way back is what is multiplied now, not a second copy."""

    @staticmethod
    def forward(ctx, weight, dtype):
        ctx.dtype = weight.dtype
        return in_memory(weight.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


@torch.library.custom_op("moe::grouped_mm", mutates_args=())
def _opaque_grouped_mm(a: torch.Tensor, b: torch.Tensor, offset_E: torch.Tensor) -> torch.Tensor:
    """grouped_mm as one black box for torch.compile, whose tracing of it knows bfloat16 only."""
    return _grouped_mm(a, b, offs=offset_E)


@_opaque_grouped_mm.register_fake
def _(a, b, offset_E):
    shape = (a.shape[0], b.shape[2]) if b.dim() == 3 else (len(offset_E), a.shape[0], b.shape[1])
    return a.new_empty(shape)


def _opaque_backward(ctx, grad_NB):
    x_NA, w_EAB, offset_E = ctx.saved_tensors
    return (_opaque_grouped_mm(grad_NB, w_EAB.transpose(1, 2), offset_E),
            _opaque_grouped_mm(x_NA.t(), grad_NB, offset_E), None)


_opaque_grouped_mm.register_autograd(_opaque_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def expert_mm(x_NA, w_EAB, offset_E):
    """Rows sorted by expert times each expert's matrix: (N, A) × (E, A, B) → (N, B).

    offset_E (int32): where each expert's rows end. One kernel for all experts; float64, which only the
    tests use, has no such kernel and takes the loop.
    """
    if x_NA.dtype == torch.float64:
        parts = x_NA.tensor_split(offset_E[:-1].long().cpu())
        return torch.cat([part @ w for part, w in zip(parts, w_EAB)])
    if torch.compiler.is_compiling() and x_NA.dtype != torch.bfloat16:
        return _opaque_grouped_mm(x_NA, w_EAB, offset_E)
    return _grouped_mm(x_NA, w_EAB, offs=offset_E)


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_expert, self.k = config.n_expert, config.n_expert_per_tok
        self.router = Router(config)
        self.w1_EDF = nn.Parameter(torch.empty(config.n_expert, config.n_embd, config.n_inner))
        self.w2_EFD = nn.Parameter(torch.empty(config.n_expert, config.n_inner, config.n_embd))
        nn.init.normal_(self.w1_EDF, std=0.02)
        nn.init.normal_(self.w2_EFD, std=0.02 / (2 * config.n_layer) ** 0.5)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """(B, T, D) → the same shape, the balance loss (scalar), and each expert's share of rows (E,)."""
        x_TD = x.reshape(-1, x.shape[-1])
        gate_TK, expert_TK = self.router(x_TD)
        if x_TD.shape[0] <= ALL_EXPERTS_TOKENS and x.is_cuda and not self.training:
            y_TD = self.all_experts(x_TD, gate_TK, expert_TK)
        else:
            y_TD = self.many_tokens(x_TD, gate_TK, expert_TK)
        share_E = F.one_hot(expert_TK, self.n_expert).sum((0, 1)) / expert_TK.numel()
        balance = balance_loss(gate_TK, expert_TK, self.n_expert)
        return self.dropout(y_TD).view_as(x), balance, share_E.detach()

    def many_tokens(self, x_TD, gate_TK, expert_TK):
        """Sort the (token, expert) pairs by expert, run all experts at once, put the rows back."""
        dtype = _compute_dtype(x_TD)
        w1_EDF, w2_EFD = (weight if weight.dtype == dtype else _Cast.apply(weight, dtype) for weight in (self.w1_EDF, self.w2_EFD))
        T, D = x_TD.shape
        # uint8 keys: the radix sort makes one pass instead of eight
        sorted_N, order_N = expert_TK.reshape(-1).to(torch.uint8).sort(stable=True)
        inverse_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(T * self.k, device=x_TD.device))
        expert_E = torch.arange(self.n_expert, device=x_TD.device)
        offset_E = (sorted_N[:, None] <= expert_E).sum(0, dtype=torch.int32)

        x_TKD = x_TD.to(dtype)[:, None].expand(T, self.k, D)
        x_ND = _Permute.apply(x_TKD.reshape(T * self.k, D), order_N, inverse_N)
        h_NF = F.silu(expert_mm(x_ND, w1_EDF, offset_E))
        # The gate scales the hidden row, not the output: the map is linear from here on, and the
        # output need not be kept for the gate's gradient
        h_NF = h_NF * _Permute.apply(gate_TK.reshape(-1, 1), order_N, inverse_N).to(dtype)
        y_ND = expert_mm(h_NF, w2_EFD, offset_E)
        # .to: under autocast sum gives float32, and the residual stream would go on in it
        return _Permute.apply(y_ND, inverse_N, order_N).view(T, self.k, D).sum(1).to(x_TD.dtype)

    def lay_out_for_decoding(self):
        """Turn the weights in memory, not in shape, so that a single row is summed along it: on a GPU 1.2 times the
        tokens a second, in bfloat16 on a CPU 2.5 times."""
        self.router.weight_DE.data = self.router.weight_DE.data.t().contiguous().t()
        for weight in (self.w1_EDF, self.w2_EFD):
            turned = torch.empty_like(weight.data.transpose(1, 2), memory_format=torch.contiguous_format)
            for to, expert in zip(turned, weight.data):      # one by one is 2.6 times as fast on a CPU
                to.copy_(expert.t())
            weight.data = turned.transpose(1, 2)

    def one_row(self, x_D):
        """For decoding a single row on a CPU: the chosen experts one after the other, each a matrix-vector product."""
        gate_1K, expert_1K = self.router(x_D[None])
        y_D = 0
        for gate, expert in zip(gate_1K[0].tolist(), expert_1K[0].tolist()):
            h_F = F.silu(torch.mv(self.w1_EDF[expert].t(), x_D)) * gate
            y_D = y_D + torch.mv(self.w2_EFD[expert].t(), h_F)
        return y_D

    def one_row_compiled(self, x_D):
        """forward of one token, written as fused.py says. Returns (D,), float32."""
        logits_E = product(self.router.weight_DE.t(), x_D)
        experts_K = largest(logits_E[None], self.k)
        gates_K = [(logits_E[expert[0]] - logits_E[experts_K[0][0]]).exp() for expert in experts_K]
        rows_KF = [in_memory((F.silu(products(self.w1_EDF.transpose(1, 2), x_D, expert[0]).sum(-1)) * gate / sum(gates_K)).to(x_D.dtype))
                   for expert, gate in zip(experts_K, gates_K)]
        return sum(products(self.w2_EFD.transpose(1, 2), row_F, expert[0]) for expert, row_F in zip(experts_K, rows_KF)).sum(-1)

    def all_experts(self, x_TD, gate_TK, expert_TK):
        """For few tokens, when not training: each of them through all experts, with a gate of 0 for those not chosen. More
        arithmetic, but the time goes into reading the weights; and nothing is sorted, so that a CUDA graph can hold it."""
        dtype = _compute_dtype(x_TD)
        gate_TE = gate_TK.new_zeros(len(x_TD), self.n_expert).scatter(1, expert_TK, gate_TK)
        h_ETF = F.silu(x_TD.to(dtype) @ self.w1_EDF.to(dtype)) * gate_TE.t()[:, :, None].to(dtype)
        return (h_ETF @ self.w2_EFD.to(dtype)).sum(0).to(x_TD.dtype)


def _compute_dtype(x):
    """The type in which the experts multiply: autocast's where it is on (grouped_mm is not on its list)."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
