"""Tiny models with random weights, and the folder that train.py would leave them in."""
import os
from dataclasses import asdict

import torch

from minillm import checkpoint
from minillm.same_function import fingerprint
from model import GPT, GPTConfig
from support.tiny_tokenizer import VOCAB, make_tokenizer, tokenizer


def tiny_model(n_expert=0, block_size=48, seed=0, vocab_size=VOCAB, **config):
    """A float32 model whose attention and FFN matter.

    Its weights are ten times those of a fresh one.
    """
    torch.manual_seed(seed)
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48, n_expert_per_tok=2)
    shape |= dict(block_size=block_size, vocab_size=vocab_size, n_expert=n_expert) | config
    model = GPT(GPTConfig(**shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10)
    model.tokenizer, model.step = tokenizer(), 7
    return model


def model_for_decoding(dtype, device=torch.device("cpu"), **config):
    """A tiny model for generation. Norms of 1 and biases of 0 would hide that they are left out."""
    model = tiny_model(**config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) / 4
    return model.for_generation(device, dtype)


def talkative(model):
    """`model`, which now says nothing but letters and never ends an answer by itself.

    The first channel of the embedding parts letters (+3) from all other tokens (-3). The last FFN's
    first two neurons turn it into its magnitude, so that it is positive in every output.
    """
    letters = torch.tensor([data.decode("utf-8", "replace").isalpha()
                            for data in tokenizer().token_bytes])
    model.wte.weight[:, 0] = torch.where(letters, 3.0, -3.0)
    ffn = model.blocks[-1].ffn
    if hasattr(ffn, "up"):
        pairs = [(ffn.up.weight, ffn.down.weight)]
    else:
        pairs = [(w1.T, w2.T) for w1, w2 in zip(ffn.w1_EDF, ffn.w2_EFD)]
    for up, down in pairs:
        up[:2], down[0] = 0, 0                   # up: (neuron, channel), down: (channel, neuron)
        up[0, 0], up[1, 0], down[0, :2] = 20, -20, 20
    return model


def write_folder(folder, model):
    """What train.py leaves of `model`, as far as using it goes."""
    make_tokenizer(os.path.join(folder, "tokenizer"))
    checkpoint.save(checkpoint.step_path(folder, 7), {
        "model": model.state_dict(), "model_config": asdict(model.config), "step": 7,
        "tokenizer_hash": tokenizer().hash, "fingerprint": fingerprint(model)})
    return folder
