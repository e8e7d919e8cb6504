"""Rotary positions, RoPE (arXiv 2104.09864): each pair of channels is turned by an angle that grows with the position."""
import torch


def rope_table(config):
    """cos and sin of position × frequency, each (block_size, head width / 2), float32."""
    half = config.n_embd // config.n_head // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.block_size, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def apply_rope(x, rope):
    """Rotate each pair (x[i], x[i + half]) of the last axis. x: (B, T, H, hd); rope: cos, sin that broadcast to (B, T, H, hd / 2)."""
    cos, sin = rope
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
