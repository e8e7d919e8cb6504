"""The experts of an MoE layer in one kernel: rows sorted by expert, then torch's grouped_mm.

Every (token, chosen expert) pair is a row. Sorted by expert, the rows of all experts go through one
grouped matmul, whatever their numbers: no capacity limit, no token dropped, no shape that depends
on the data, so the layer compiles with fullgraph=True.

Shape suffixes are those of moe.py, and R = N·K: one row per (token, chosen expert) pair.

Paper: MegaBlocks, which sorts tokens by expert instead of padding them (arXiv 2211.15841).
"""
import torch
from torch.nn import functional as F

ALL_EXPERTS_TOKENS = 1024        # generating on a GPU, up to this many tokens visit all experts


def grouped_experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD):
    """Fast version of moe.loop_over_experts: (N, D) → (N, D).

    It multiplies K of E experts per token where the loop multiplies all E. 149,291 tokens/s in
    training (H200, `python -m bench.train --n_expert=8`).
    """
    N, D = x_ND.shape
    E, K = len(w1_EDF), expert_NK.shape[1]
    dtype = _compute_dtype(x_ND)
    w1_EDF, w2_EFD = _cast(w1_EDF, dtype), _cast(w2_EFD, dtype)
    order_R, inverse_R, offset_E = sort_by_expert(expert_NK, E)

    x_NKD = x_ND.to(dtype)[:, None].expand(N, K, D)
    x_RD = _Permute.apply(x_NKD.reshape(N * K, D), order_R, inverse_R)
    h_RF = F.silu(expert_mm(x_RD, w1_EDF, offset_E))
    # The gate scales the hidden row, not the output: the map is linear from here on, and the
    # output need not be kept for the gate's gradient
    h_RF = h_RF * _Permute.apply(gate_NK.reshape(-1, 1), order_R, inverse_R).to(dtype)
    y_RD = expert_mm(h_RF, w2_EFD, offset_E)
    y_NKD = _Permute.apply(y_RD, inverse_R, order_R).view(N, K, D)
    # .to: under autocast sum gives float32, and the residual stream would continue in it
    return y_NKD.sum(1).to(x_ND.dtype)


def sort_by_expert(expert_NK, E):
    """The order (R,) of the pairs, its inverse (R,), and where each expert's rows end (E,)."""
    # uint8 keys: the radix sort makes one pass instead of eight
    sorted_R, order_R = expert_NK.reshape(-1).to(torch.uint8).sort(stable=True)
    row_R = torch.arange(len(order_R), device=order_R.device)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, row_R)
    expert_E = torch.arange(E, device=order_R.device)
    offset_E = (sorted_R[:, None] <= expert_E).sum(0, dtype=torch.int32)
    return order_R, inverse_R, offset_E


def all_experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD):
    """Fast version of moe.loop_over_experts for few tokens on a GPU, without gradients.

    Every token goes through all experts, with a gate of 0 for those not chosen. More arithmetic,
    but the time goes into reading the weights; nothing is sorted, so a CUDA graph can hold it:
    decoding made 1,002 tokens/s instead of 796 (H200, `python -m bench.decode --n_expert=8
    --compile=False`).
    """
    dtype = _compute_dtype(x_ND)
    gate_NE = gate_NK.new_zeros(len(x_ND), len(w1_EDF)).scatter(1, expert_NK, gate_NK)
    h_ENF = F.silu(x_ND.to(dtype) @ w1_EDF.to(dtype)) * gate_NE.t()[:, :, None].to(dtype)
    return (h_ENF @ w2_EFD.to(dtype)).sum(0).to(x_ND.dtype)


def generating_experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD):
    """For generation and scoring, without gradients: all_experts or grouped_experts."""
    few = x_ND.is_cuda and len(x_ND) <= ALL_EXPERTS_TOKENS
    experts = all_experts if few else grouped_experts
    return experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD)


def lay_out_for_decoding(moe):
    """Transpose the experts' weights in memory, not in shape, so that each sum reads contiguously.

    Decoding makes 1.2 times the tokens/s (H200, `python -m bench.decode --n_expert=8`), in
    bfloat16 on a CPU 2.5 times (Xeon, the same with `--device=cpu`).
    """
    if hasattr(moe.router, "weight_DE"):         # somebody's may have a linear layer
        moe.router.weight_DE.data = moe.router.weight_DE.data.t().contiguous().t()
    for weight in (moe.w1_EDF, moe.w2_EFD):
        view = weight.data.transpose(1, 2)
        laid_out = torch.empty_like(view, memory_format=torch.contiguous_format)
        for to, expert in zip(laid_out, view):           # one by one is 2.6 times as fast on a CPU
            to.copy_(expert)
        weight.data = laid_out.transpose(1, 2)


def expert_mm(x_RA, w_EAB, offset_E):
    """Rows sorted by expert times each expert's matrix: (R, A) × (E, A, B) → (R, B).

    offset_E (int32): where each expert's rows end. float64, in which agreement.py compares, has no
    such kernel and takes a loop.
    """
    if x_RA.dtype == torch.float64:
        parts = x_RA.tensor_split(offset_E[:-1].long().cpu())
        return torch.cat([part @ w for part, w in zip(parts, w_EAB)])
    if torch.compiler.is_compiling() and x_RA.dtype != torch.bfloat16:
        return _opaque_grouped_mm(x_RA, w_EAB, offset_E)
    return F.grouped_mm(x_RA, w_EAB, offs=offset_E)


@torch.library.custom_op("moe::grouped_mm", mutates_args=())
def _opaque_grouped_mm(a: torch.Tensor, b: torch.Tensor, offset_E: torch.Tensor) -> torch.Tensor:
    """grouped_mm as one black box for torch.compile, whose tracing of it knows bfloat16 only."""
    return F.grouped_mm(a, b, offs=offset_E)


@_opaque_grouped_mm.register_fake
def _(a, b, offset_E):
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(len(offset_E), a.shape[0], b.shape[1])


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _opaque_backward(ctx, grad_RB):
    x_RA, w_EAB, offset_E = ctx.saved_tensors
    grad_x = _opaque_grouped_mm(grad_RB, w_EAB.transpose(1, 2), offset_E)
    grad_w = _opaque_grouped_mm(x_RA.t(), grad_RB, offset_E)
    return grad_x, grad_w, None


_opaque_grouped_mm.register_autograd(_opaque_backward, setup_context=_save_inputs)


class _Permute(torch.autograd.Function):
    """rows[index], where `index` is a permutation and `inverse` undoes it.

    Autograd would scatter-add the gradient, with atomics; for a permutation it is a gather.
    """

    @staticmethod
    def forward(ctx, rows, index, inverse):
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


class _Cast(torch.autograd.Function):
    """weight.to(dtype), once in memory: autograd keeps what is multiplied, not a second copy."""

    @staticmethod
    def forward(ctx, weight, dtype):
        ctx.dtype = weight.dtype
        return realize(weight.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def _cast(weight, dtype):
    if weight.dtype == dtype:
        return weight
    return _Cast.apply(weight, dtype)


def _compute_dtype(x):
    """The type in which the experts multiply: autocast's if it is on; it ignores grouped_mm."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def realize(x):
    """x, which torch.compile then writes to memory once and does not compute where it is read."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())     # only what is in memory has strides
