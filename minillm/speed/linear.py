"""The linear layer of attention and FFN: nn.Linear, but for the gradient of its weight on a GPU."""
import torch
import torch.nn as nn


class Linear(nn.Linear):
    """nn.Linear. Where float32 weights are multiplied in 16 bits on a GPU, their gradient leaves its product in float32.

    Autocast rounds it to 16 bits first and then copies it into float32: less exact, and a second pass over every gradient.
    """

    def own_product(self, x):
        """The autograd function that multiplies x; None: nn.Linear does."""
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and self.weight.dtype == torch.float32 and torch.is_grad_enabled():
            return Product

    def forward(self, x):
        product = self.own_product(x)
        if product is None:
            return super().forward(x)
        y = product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Product(torch.autograd.Function):
    """x (N, K) in 16 bits, weight (M, K) in float32 → x @ weight.t() (N, M) in x's type."""

    @staticmethod
    def forward(ctx, x, weight):
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, torch.mm(grad.t(), x, out_dtype=torch.float32)
