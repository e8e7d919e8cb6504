"""How the embedding starts: a fresh one for Muon, and rows that earlier training never trained."""
import math

import numpy as np
import torch
from torch.nn import functional as F

from minillm.dataloader import derive_seed
from minillm.tokenizer import IM_START

EMBEDDING_STD = 0.5          # of a fresh model that Muon trains
ALIKE = 0.9                  # cosine above which two rows count as collapsed into one
SCANNED = 1 << 27            # tokens of the coming data that are looked at


@torch.no_grad()
def init_for_muon(model):
    """Start with a larger embedding, and a last norm that gives the logits their usual spread.

    The embedding is also the output projection: Muon's blocks learn best on top of inputs of
    about the size of their own outputs.
    """
    width = model.wte.weight.shape[1]
    model.wte.weight.mul_(EMBEDDING_STD / model.config.init_std)
    model.norm.weight.fill_(0.64 / EMBEDDING_STD / math.sqrt(width))


@torch.no_grad()
def redraw_collapsed_rows(model, data, seed):
    """Before training goes on with other data: new embeddings for tokens never seen before.

    A token that no text contains gets one tiny gradient, the same for all such tokens: AdamW turns
    it into full steps in one direction, weight decay removes the random start, and the rows
    collapse into one. SFT would first have to tell them apart (control tokens, and words that only
    questions have), and forgets facts meanwhile. <|im_start|> is in no text, so what looks like its
    row has collapsed.

    data: a TokenData; only the tokens that it holds get new rows, as large as the others are.
    Returns how many.
    """
    weight = model.wte.weight
    alike = F.cosine_similarity(weight, weight[IM_START], dim=1) > ALIKE
    if alike.sum() < 2:              # <|im_start|> stands alone: it has been trained
        return 0
    tokens = torch.from_numpy(np.unique(data.tokens[:SCANNED]).astype(np.int64))
    rows = tokens[alike[tokens]]
    size = weight[~alike].square().mean().sqrt()
    generator = torch.Generator().manual_seed(derive_seed(seed, "embedding"))
    weight[rows] = torch.randn(len(rows), weight.shape[1], generator=generator) * size
    return len(rows)
