"""Attention on a CPU: 16-bit rows are computed in float32, whose backward pass is much faster."""
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.attention import causal_attention, document_mask
from minillm.tokenizer import END_OF_TEXT

MASKS = ["causal", "documents"]


def qkv(dtype):
    torch.manual_seed(0)
    shapes = [(2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def mask_of(kind):
    if kind == "causal":
        return None
    idx = torch.full((2, 16), END_OF_TEXT + 5)
    idx[0, 6] = END_OF_TEXT
    return document_mask(idx)


def with_gradients(attend, tensors, autocast=None):
    """The output and the gradients of q, k and v."""
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = attend(*tensors)
    y.float().square().sum().backward()
    return y, *(tensor.grad for tensor in tensors)


class AttentionTypes(TorchDispatchMode):
    """The types of the queries of each attention kernel, forward and backward."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(function):
            backward = "backward" in str(function)       # its first argument is a gradient
            self.found["backward" if backward else "forward"] = args[1 if backward else 0].dtype
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_computed_in_float32(kind, dtype, autocast):
    tensors = qkv(dtype)
    with AttentionTypes() as kernels:
        found = with_gradients(lambda q, k, v: causal_attention(q, k, v, mask_of(kind)), tensors,
                               dtype if autocast else None)

    assert kernels.found == {"forward": torch.float32, "backward": torch.float32}
    assert all(tensor.dtype == dtype for tensor in found)
    exact = with_gradients(lambda q, k, v: causal_attention(q, k, v, mask_of(kind)),
                           [tensor.detach().float().requires_grad_() for tensor in tensors])
    assert torch.equal(found[0], exact[0].to(dtype))
    for rounded, gradient in zip(found[1:], exact[1:]):
        torch.testing.assert_close(rounded.float(), gradient, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_larger_types_stay(kind, dtype):
    with AttentionTypes() as kernels:
        found = with_gradients(lambda q, k, v: causal_attention(q, k, v, mask_of(kind)), qkv(dtype))

    mask = mask_of(kind)
    expected = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True), qkv(dtype))
    assert set(kernels.found.values()) == {dtype}
    for one, other in zip(found, expected):
        assert torch.equal(one, other)
