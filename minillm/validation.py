"""How well a model predicts the validation split.

During training: its loss on a few batches. For eval.py: loss, accuracy, bits per byte, expert load.
"""
import math

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from minillm.attention import document_mask
from minillm.dataloader import permute
from minillm.device import autocast, to_device
from minillm.errors import UserError


def validation_loss(forward, data, s, device, rank, world, stop):
    """Mean cross-entropy per supervised token, nats, always over the same windows.

    None if the run was asked to stop meanwhile. Gradients are not needed, but are not turned off
    here: the caller may have a reason to keep them.
    """
    n = min(s.eval_iters * s.batch_size, data.n_windows)
    windows = permute(range(n), data.n_windows, key=0)       # the same ones for every seed
    # sums in float64, which mps does not have
    sums = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    for start in range(0, len(windows), world * s.batch_size):
        if stop.asked:
            sums[2] += 1
            break
        rows = windows[start + rank * s.batch_size:][: s.batch_size]
        # The last batch of each rank is filled up, even if no window is left for it: all batches
        # have one shape, so no rank compiles again while the others wait
        x, y = data.windows(rows.tolist() + [windows[0]] * (s.batch_size - len(rows)))
        y[len(rows):] = -1
        x, y = to_device((x, y), device)
        loss = forward(x, y)[0].detach()         # activations are not kept until the next batch
        sums[:2] += torch.stack((loss.to(sums.device).double(), (y >= 0).sum().to(sums.device)))
    if world > 1:
        dist.all_reduce(sums)
    loss_sum, n_supervised, cut_short = sums.tolist()
    if cut_short:
        return None
    _check_supervised(n_supervised, data)
    return loss_sum / n_supervised


@torch.inference_mode()
def score(model, data, doc_mask, batch_size, batches, device, dtype):
    """Predict every supervised token of a TokenData, or of its first `batches` batches (0: all).

    Returns a dict: loss (nats per supervised token), accuracy, tokens (how many were supervised),
    and for an MoE model load, the share of tokens per expert, (MoE layers, n_expert), and
    moe_layers, their numbers.
    """
    loss, correct, n_supervised = 0.0, 0, 0
    load, seen = 0.0, 0
    starts = range(0, data.n_windows, batch_size)
    if batches:
        starts = starts[:batches]
    for start in tqdm(starts, unit="batch", disable=None):
        windows = range(start, min(start + batch_size, data.n_windows))
        x, y = (tensor.to(device) for tensor in data.windows(windows))
        attn_mask = document_mask(x) if doc_mask else None
        with autocast(device, dtype):
            hidden, moe_stats = model.hidden(x, attn_mask)
            logits = model.logits(hidden)
        logits, targets = logits.flatten(0, 1).float(), y.flatten()
        batch_loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        loss += batch_loss.double().item()
        correct += (logits.argmax(-1) == targets).sum().item()
        n_supervised += (targets >= 0).sum().item()
        if moe_stats:
            _, batch_load = moe_stats
            load = load + batch_load.double() * x.numel()
            seen += x.numel()
    _check_supervised(n_supervised, data)
    if not math.isfinite(loss):
        raise UserError(f"the loss on {data.folder} is {loss}: the model's weights are not finite, "
                        f"or too large for {str(dtype).removeprefix('torch.')}")
    result = {"loss": loss / n_supervised, "accuracy": correct / n_supervised,
              "tokens": n_supervised}
    if seen:
        result["load"] = (load / seen).tolist()
        result["moe_layers"] = [layer for layer, _ in model.moe_layers()]
    return result


def _check_supervised(n_supervised, data):
    """Raise UserError where no token was predicted: a loss of 0 would look like a perfect model."""
    if not n_supervised:
        raise UserError(f"the validation windows of {data.folder} that were read hold no "
                        "supervised token: raise --eval_iters, or prepare the data again with a "
                        "larger --val_fraction")


def check_counts(meta):
    """Raise UserError if meta.json does not count what bits_per_byte needs."""
    for key in _count_keys(meta):
        count = meta["splits"]["val"].get(key)
        if type(count) is not int or count < 1:
            raise UserError(f"the data's meta.json does not count {key!r}: prepare the data again")


def bits_per_byte(loss, meta):
    """Nats per token → bits per byte of UTF-8 text, by the split's counts of tokens and bytes."""
    tokens, size = (meta["splits"]["val"][key] for key in _count_keys(meta))
    return loss / math.log(2) * tokens / size


def _count_keys(meta):
    return ("learned_tokens", "learned_bytes") if meta["kind"] == "sft" else ("tokens", "bytes")
