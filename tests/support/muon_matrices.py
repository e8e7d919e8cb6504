"""A few matrices of each shape that Muon meets, their optimizer, their gradients."""
import torch

from minillm.muon import Muon

SPLIT = (16, 8, 8)


def matrices(dtype=torch.float64, count=4):
    """`count` of each: fused qkv, up and down, experts (E, in, out). 4 are taken in two groups."""
    torch.manual_seed(0)
    shapes = {"qkv": [(32, 16)] * count, "up": [(48, 16)] * count, "down": [(16, 48)] * count,
              "experts": [(5, 16, 24)] * count}
    return {name: [torch.nn.Parameter(torch.randn(shape, dtype=dtype) * 0.1) for shape in group]
            for name, group in shapes.items()}


def muon_of(p, **options):
    rest = [x for name in p if name != "qkv" for x in p[name]]
    return Muon([{"params": p["qkv"], "split": SPLIT, "weight_decay": 0.3},
                 {"params": rest, "weight_decay": 0.3}], lr=0.03, **options)


def all_of(p):
    return [x for group in p.values() for x in group]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for x in parameters:
        x.grad = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)
