"""Do two pieces of code compute the same function? Known small weights, then compare the logits.

    for copy in copies(model):               # of the same class and settings, some 10 ms
        same(copy(text(copy)), other(copy, text(copy)))
    fingerprint(model)                       # the logits of the copies: change with the code alone
    check_attention(model)                   # its branches are one function, or a line says so

Formulas of model.py and moe.py are repeated where they must be: in minillm/speed and in the
exporters; and a checkpoint holds weights, not the code that they belong to. Whoever changes the
model must hear of each place that still computes the old one, so each of them compares.

Not compared: what only training does (dropout, the router's noise); and what concerns only tokens
that lie LONGEST or more apart, or in the layers from FIRST_LAYERS on, 12 or more.
"""
import contextlib
import random
import warnings
import zlib
from dataclasses import replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from minillm.attention import document_mask
from minillm.distributed import warn0
from minillm.generation import KVCache, decode_one_token, prefill
from minillm.tokenizer import END_OF_TEXT

IDS = (1, 9, 4, 15, 2, 0, 11, 3, 13, 6, 10, 5)   # the beginning of a text for the copies
VOCAB = 16
LONGEST = 1024                                   # tokens of a text
FIRST_LAYERS = 4                                 # that are compared over a long text
DEEPEST = 64                                     # layers that are compared at all
DECODED = 6                                      # of them, one at a time


@contextlib.contextmanager
def one_thread():
    """Within it torch computes in one thread: on a busy machine several wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def copies(model, deepest=DEEPEST):
    """Two small copies of `model`: one with all of its heads and layers, one with all its context.

    A change may concern some layers alone, or distant tokens: a sliding window, for instance.
    """
    c = model.config
    length = max(len(IDS), min(c.block_size, LONGEST))
    # so that a long text takes 10 ms too
    long = {"block_size": length, "n_head": min(c.n_head // c.n_kv_head, 2), "n_kv_head": 1}
    return small_copy(model, deepest), small_copy(model, FIRST_LAYERS, **long)


def small_copy(model, deepest=DEEPEST, **sizes):
    """A model like `model`, of another size, float64, on the CPU: the same numbers every time.

    All settings stay but the sizes, so that a setting that somebody adds counts as well.
    """
    sizes = {"block_size": len(IDS), "n_head": model.config.n_head} | sizes
    config = replace(model.config, vocab_size=VOCAB, n_inner=16, dropout=0.0,
                     n_layer=min(model.config.n_layer, deepest), n_embd=8 * sizes["n_head"],
                     **sizes)
    with torch.random.fork_rng(devices=[]):      # whoever draws next must not notice
        copy = type(model)(config)
    for name, parameter in copy.named_parameters():
        parameter.data = known_numbers(name, parameter.shape)
    for module in copy.modules():
        if isinstance(module, nn.Embedding):
            # small rows show the norm's eps, large ones whatever bounds the logits
            factors = torch.logspace(-3, 1, len(module.weight), dtype=torch.float64)
            module.weight.data *= factors[:, None]
    copy.double().eval().requires_grad_(False)
    saved = copy.state_dict()
    for name, buffer in copy.named_buffers():    # a bias of the router, say; not a mask
        if name in saved and buffer.is_floating_point() and buffer.dim() == 1:
            buffer.copy_(known_numbers(name, buffer.shape))
    return copy


def known_numbers(name, shape):
    """Pseudo-random float64 numbers that depend on a parameter's name and shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
    if len(shape) < 2:
        return numbers + 0.5                     # of norms and biases
    return (2 * numbers - 1) * 2 / shape[-1] ** 0.5


def text(copy):
    """Token ids (1, T) that fill the context of a copy; <|endoftext|> stands at place 5 alone."""
    further = random.Random(0).choices(range(1, VOCAB), k=LONGEST)
    return torch.tensor([[*IDS, *further][: copy.config.block_size]])


@one_thread()
@torch.no_grad()
def fingerprint(model, deepest=DEEPEST):
    """Logits (rows, V) of the small copies, float64: they follow from the code and its settings.

    Checkpoints hold them: whatever changes them lets train.py and chat.py warn of older ones. None
    where there are none: a changed model may refuse the copies' sizes, or need a GPU.
    """
    try:
        short, long = [copy(text(copy))[0] for copy in copies(model, deepest)]
    except Exception:                            # of code that we do not know
        return None
    return torch.cat((short, long[::16]))        # a longer context adds rows at the end


def has_changed(model, then):
    """Does the code now give other logits than `then`, the fingerprint in a checkpoint?

    Older ones hold fewer layers, or the rows of the short text alone. False where there is nothing
    to compare.
    """
    if not isinstance(then, torch.Tensor) or then.layout != torch.strided or then.is_meta:
        return False
    for deepest in (DEEPEST, FIRST_LAYERS):
        now = fingerprint(model, deepest)
        if now is None:
            return False
        rows = min(len(now), len(then)) if then.dim() else 0
        if rows and same(then[:rows], now[:rows]):
            return False
    return True


def check_attention(model, flex=False):
    """Say on stderr where the ways to attend differ, on small copies of `model`.

    Over a whole text without a mask, with document_mask (flex: also with the one for a GPU), and
    over a KV cache: minillm/attention.py has a function or a branch for each.
    """
    different = {}                               # a dict: in order, and each name once
    try:
        for copy in copies(model):
            expected, found = attend_in_all_ways(copy, flex)
            different |= {name: None for name in found if not same(found[name], expected)}
    except Exception as error:       # of code that we do not know: other sizes, a kernel for GPUs
        warn0(f"minillm/attention.py was not compared with itself: {in_a_line(error)}")
        return
    for name in different:
        warn0(f"minillm/attention.py: attention {name} is another function than over a whole text: "
              "change causal_attention's branches, the masks and cached_attention alike; what the "
              "model does elsewhere with other tokens or positions, cached_forward must do as well")


@one_thread()
@torch.no_grad()
def check_loss(model):
    """Say on stderr if training's loss is not the cross-entropy of the logits, on a small copy.

    The product of the output layer stands in GPT.logits and in cross_entropy: training calls the
    latter alone, eval.py, chat.py and the exports the former.
    """
    try:
        copy, ids = small_copy(model), torch.tensor([IDS])
        logits, loss = copy(ids)[0], copy(ids, ids)[0]
        expected = F.cross_entropy(logits, ids[0], reduction="sum")
    except Exception as error:
        warn0(f"model.py: the loss was not compared with the logits: {in_a_line(error)}")
        return
    if not same(loss, expected):
        warn0("model.py: the training loss is not the cross-entropy of GPT.logits: train.py and "
              "eval.py will give different numbers; if you changed one of them, look at the other")


@one_thread()
@torch.no_grad()
def noisy_in_training(model):
    """Does the model compute something else in training, or move a buffer? Dropout aside.

    Logits and loss: somebody may add a term to the loss in training alone.
    """
    try:
        copy, ids = small_copy(model), torch.tensor([IDS])
        before = [copy(ids), copy(ids, ids)[0], *(buffer.clone() for buffer in copy.buffers())]
        with torch.random.fork_rng(devices=[]):
            copy.train()
            after = [copy(ids), copy(ids, ids)[0], *copy.buffers()]
        return not all(map(torch.equal, before, after))
    except Exception:                            # of code that we do not know
        return True


@one_thread()
@torch.no_grad()
def attend_in_all_ways(copy, flex):
    """(the logits (T, V) of a text, {another way to attend: its logits}), all the same."""
    ids = text(copy)
    ids = ids[ids != END_OF_TEXT][None]          # one document
    expected = copy(ids)[0]
    found = {"with a document mask": copy(ids, attn_mask=document_mask(ids))[0]}
    if flex:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # of torch: it is not compiled here
            mask = document_mask(ids, flex=True)
            found["with flex_attention"] = copy(ids, attn_mask=mask)[0]
    cache, read = KVCache(copy), ids.shape[1] - DECODED
    rows = [prefill(copy, cache, ids[:, :read].tolist())]
    for t in range(read, ids.shape[1]):
        rows.append(decode_one_token(copy, cache, ids[:, t: t + 1], torch.tensor([[t]]), t + 1))
    found["over a KV cache"] = torch.cat((expected[:read - 1], *rows))
    return expected, found


def same(found, expected, tolerance=1e-4):
    """Are two tensors equal, up to rounding? Relative to the largest number of `expected`."""
    if found.shape != expected.shape:
        return False
    error = (found.double() - expected.double()).abs().max()
    return bool(error <= tolerance * expected.abs().max())       # False for a NaN


def in_a_line(error):
    """An exception's type and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
