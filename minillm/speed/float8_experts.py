"""The experts of an MoE layer with 8-bit matmuls, for training on Hopper.

    python train.py config/moe_pretrain.py --fp8=True

171,922 tokens/s instead of 152,498 in bfloat16 (H200, `python -m bench.train --n_expert=8
--fp8=True`).
The two matmuls of every expert and those of the gradients that go back through them multiply e4m3
by e4m3 in torch's grouped kernel: rows sorted by expert, as in grouped_mm.py. The weights'
gradients are bfloat16 matmuls: for 8 bits their rows would have to be laid out by columns, which
takes longer than 8 bits gain. Validation and generation stay in 16 bits, too.

Nothing is remembered between two steps. The scales:
- activations have none, and each expert's matrix is scaled by its largest element, as in float8.py;
- each token's gradient is scaled by its norm;
- that of the hidden rows, by the largest value that it can have: a gradient times a row of weights
  is at most the product of their norms. The usual ones are a hundredth of that, or a thousandth;
  e4m3 holds those as exactly, and nothing is ever cut off.

The gate weighs an expert's output, not its hidden row as in 16 bits: 8 bits then hold the same
numbers as in a dense FFN, and whatever differs by row weighs rows of D numbers only.

Shape suffixes are those of grouped_mm.py.
"""
import torch
from torch.nn import functional as F

from minillm.speed.float8 import E4M3, to_float8
from minillm.speed.grouped_mm import grouped_experts, realize, sort_by_expert

MOST = torch.finfo(E4M3).max
# The slope of SiLU is at most 1.1; 8 bits and bfloat16 round up by at most 1.07
SLOPE = 1.25


def float8_experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD):
    """Fast version of moe.loop_over_experts: (N, D) → (N, D)."""
    if not torch.is_grad_enabled():
        return grouped_experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD)
    order_R, inverse_R, offset_E = sort_by_expert(expert_NK, len(w1_EDF))
    return Float8Experts.apply(x_ND, gate_NK, w1_EDF, w2_EFD, order_R, inverse_R, offset_E)


class Float8Experts(torch.autograd.Function):
    """x (N, D), gates (N, K) and weights in float32 → y (N, D) in the type of x."""

    @staticmethod
    def forward(ctx, x_ND, gate_NK, w1_EDF, w2_EFD, order_R, inverse_R, offset_E):
        token_R = order_R // gate_NK.shape[1]
        row_NK = inverse_R.view_as(gate_NK)
        w1_8_EDF, w1_scale_E = weight_to_float8(w1_EDF)
        w2_8_EFD, w2_scale_E = weight_to_float8(w2_EFD)
        x8_ND = realize(to_float8(x_ND, 1, E4M3))
        a_RF = float8_mm(x8_ND[token_R], transposed(w1_8_EDF), w1_scale_E, offset_E)
        # SiLU is never below -0.3
        h8_RF = F.silu(a_RF.float()).clamp(max=MOST).to(E4M3)
        y_RD = float8_mm(h8_RF, transposed(w2_8_EFD), w2_scale_E, offset_E)
        ctx.save_for_backward(x_ND, gate_NK, a_RF, y_RD, order_R, token_R, row_NK, offset_E,
                              w1_8_EDF, w1_scale_E, w2_8_EFD, w2_scale_E)
        return weighted_sum(y_RD, gate_NK, row_NK).to(x_ND.dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        (x_ND, gate_NK, a_RF, y_RD, order_R, token_R, row_NK, offset_E,
         w1_8_EDF, w1_scale_E, w2_8_EFD, w2_scale_E) = ctx.saved_tensors
        # 1) through the gates. Each row's gradient is g8 · unit
        grad_gate_NK = (y_RD[row_NK].float() * grad_ND[:, None].float()).sum(2)
        norm_N1 = grad_ND.float().norm(dim=1, keepdim=True).clamp(min=1e-20)
        g8_ND = realize((grad_ND.float() * (MOST / norm_N1)).to(E4M3))
        unit_NK = gate_NK * norm_N1 / MOST

        # 2) through w2 and SiLU: from here on without the unit, so that no row is too large
        grad_h_RF = float8_mm(g8_ND[token_R], w2_8_EFD, w2_scale_E, offset_E)
        a_RF = a_RF.float()
        s_RF = a_RF.sigmoid()
        h_RF = (a_RF * s_RF).bfloat16()
        grad_a_RF = grad_h_RF.float() * s_RF * (1 + a_RF * (1 - s_RF))
        scale = w2_scale_E.min() / (SLOPE * MOST * grad_ND.shape[1]**0.5)
        grad_a8_RF = (grad_a_RF * scale).to(E4M3)

        # 3) through w1, and the weights' own
        grad_x_RD = float8_mm(grad_a8_RF, w1_8_EDF, w1_scale_E * scale, offset_E)
        grad_x_ND = weighted_sum(grad_x_RD, unit_NK, row_NK).to(x_ND.dtype)
        g_RD = grad_ND[token_R].float() * gate_NK.view(-1, 1)[order_R]
        x_RD = x_ND[token_R].float() * unit_NK.view(-1, 1)[order_R]
        grad_w2_EFD = weight_gradient(h_RF, g_RD.bfloat16(), offset_E)
        grad_w1_EDF = weight_gradient(x_RD.bfloat16(), grad_a_RF.bfloat16(), offset_E)
        return (grad_x_ND, grad_gate_NK, grad_w1_EDF.float(), grad_w2_EFD.float(),
                None, None, None)


def weight_to_float8(w_EAB):
    """Each expert's matrix times its scale, in 8 bits; the scales (E,)."""
    scale_E = MOST / w_EAB.detach().abs().amax((1, 2)).clamp(min=1e-20)
    return to_float8(w_EAB, scale_E[:, None, None], E4M3), scale_E


def transposed(w_EAB):
    return w_EAB.transpose(1, 2).contiguous()


def weighted_sum(rows_RD, weight_NK, row_NK):
    """Each token's rows times their weights, summed: (N, D) in float32."""
    return (rows_RD[row_NK].float() * weight_NK[:, :, None]).sum(1)


@torch.library.custom_op("moe::float8_mm", mutates_args=())
def float8_mm(x_RA: torch.Tensor, w_EBA: torch.Tensor, scale_E: torch.Tensor,
              offset_E: torch.Tensor) -> torch.Tensor:
    """8-bit rows sorted by expert times each expert's 8-bit matrix, divided by its scale: (R, B).

    The result is in bfloat16. Sums of about 14 bits, made entirely in the tensor cores. One black
    box for torch.compile, which would choose layouts that the kernel can't read.
    """
    if not x_RA.is_cuda:                 # a CPU has no such kernel
        parts = x_RA.float().tensor_split(offset_E[:-1].long())
        products = [part @ w.float().t() / s for part, w, s in zip(parts, w_EBA, scale_E)]
        return torch.cat(products).bfloat16()
    one_R = scale_E.new_ones(len(x_RA))
    scale_EB = (1 / scale_E)[:, None].repeat(1, w_EBA.shape[1])
    return torch._scaled_grouped_mm(x_RA.contiguous(), w_EBA.contiguous().transpose(1, 2), one_R,
                                    scale_EB, offs=offset_E, out_dtype=torch.bfloat16,
                                    use_fast_accum=True)


@float8_mm.register_fake
def _(x_RA, w_EBA, scale_E, offset_E):
    return x_RA.new_empty(len(x_RA), w_EBA.shape[1], dtype=torch.bfloat16)


@torch.library.custom_op("moe::weight_gradient", mutates_args=())
def weight_gradient(x_RA: torch.Tensor, grad_RB: torch.Tensor,
                    offset_E: torch.Tensor) -> torch.Tensor:
    """The sum over each expert's rows of x outer grad: (E, A, B) in bfloat16.

    A black box as well: laid out by columns, the kernel takes groups of multiples of 8 rows only.
    """
    return F.grouped_mm(x_RA.contiguous().t(), grad_RB.contiguous(), offs=offset_E)


@weight_gradient.register_fake
def _(x_RA, grad_RB, offset_E):
    return x_RA.new_empty(len(offset_E), x_RA.shape[1], grad_RB.shape[1])
