"""Initial weights: a fresh model's for Muon, and new embeddings for unseen tokens."""
import math

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from minillm.dataloader import derive_seed
from minillm.distributed import print0

EMBEDDING_STD = 0.5          # of a fresh model that Muon trains
ALIKE = 0.9                  # cosine above which two rows count as collapsed into one
FIRST_ROWS = 512             # they hold the control tokens and all 256 bytes
UNUSED_BYTES = 13            # bytes that occur in no UTF-8 text
SCANNED = 1 << 27            # how many tokens of the coming data are looked at


@torch.no_grad()
def init_for_muon(model):
    """Start with larger weights, and a last norm that gives the logits their usual spread.

    With Muon the blocks learn best if their inputs are about as large as their outputs, so the
    embedding grows; it is also the output projection, so the last norm shrinks in return. In the
    blocks of a dense model each output neuron's weights get a norm of about 1 (LeCun's init), near
    where training takes them; an MoE model learned less with it. Weights are scaled, not drawn
    anew: what starts as zero stays zero.
    """
    layers = () if model.config.n_expert else model.blocks.modules()
    for layer in layers:
        # in a model that somebody changed, leave frozen weights and other layers' as they are
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            # float64: the same bits with any number of threads
            norm = layer.weight.double().norm().item()
            layer.weight.mul_(math.sqrt(len(layer.weight)) / max(norm, 1e-12))
    if getattr(model.norm, "weight", None) is None:
        print0("the last norm has no weight to scale the logits: the embedding starts as drawn")
        return
    width = model.wte.weight.shape[1]
    model.wte.weight.mul_(EMBEDDING_STD / model.config.init_std)
    # 0.64 = 0.02 * sqrt(1024): the std of the logits with GPT-2's init, at width 1024
    model.norm.weight.fill_(0.64 / EMBEDDING_STD / math.sqrt(width))


@torch.no_grad()
def redraw_collapsed_rows(model, data, seed):
    """Before training continues with other data: new embeddings for tokens never seen before.

    All tokens that no text contains get the same tiny gradient. AdamW turns it into full steps in
    one direction, weight decay removes the random start, and so their rows collapse into one. SFT
    would first have to tell these tokens apart (control tokens, and words that only questions
    have), and would forget facts meanwhile.

    data: a TokenData; only the tokens that it holds get new rows, of the mean size of the others.
    Returns how many rows are new.
    """
    weight = model.wte.weight
    collapsed = collapsed_rows(weight)
    tokens = torch.from_numpy(np.unique(data.tokens[:SCANNED]).astype(np.int64))
    rows = tokens[collapsed[tokens]]
    others = weight if collapsed.all() else weight[~collapsed]
    size = others.square().mean().sqrt()
    generator = torch.Generator().manual_seed(derive_seed(seed, "embedding"))
    weight[rows] = torch.randn(len(rows), weight.shape[1], generator=generator) * size
    return len(rows)


def collapsed_rows(weight):
    """Which rows have collapsed into one: booleans (vocab_size,).

    The first rows are those of the control tokens and of the 256 bytes, and 13 bytes (0xC0, 0xC1,
    0xF5 to 0xFF) occur in no UTF-8 text. However many datasets the model has seen, these 13 are
    never trained: if any rows have collapsed, these have.
    """
    first = F.normalize(weight[:FIRST_ROWS].float(), dim=1)
    alike = (first @ first.mT > ALIKE).sum(1)        # for each row, how many resemble it
    if alike.max() < UNUSED_BYTES:
        return torch.zeros(len(weight), dtype=torch.bool)
    return F.cosine_similarity(weight, weight[alike.argmax()], dim=1) > ALIKE
