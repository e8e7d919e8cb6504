"""Decoding's fast twins in minillm/speed give what the plain modules and torch.topk give."""
import random
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from minillm import attention, generation
from minillm.sampling_params import SamplingParams
from minillm.speed import decode_cpu, decode_gpu, decode_ops, fast_versions
from minillm.speed.cuda_graph import GraphCache
from minillm.speed.topk import topk_by_parts
from moe import Router
from support.tiny_models import model_for_decoding, tiny_model
from support.uncached import DENSE, MOE, random_ids

KINDS = [
    pytest.param({}, id="dense"),
    pytest.param(dict(bias=True), id="bias"),
    pytest.param(dict(n_expert=4, n_expert_per_tok=2), id="MoE"),
    pytest.param(dict(n_expert=4, n_expert_per_tok=1), id="one expert per token"),
    pytest.param(dict(n_head=2, n_kv_head=2), id="wide heads"),
    pytest.param(dict(n_inner=2048), id="wide FFN"),
    pytest.param(dict(n_expert=4, n_expert_per_tok=2, n_inner=2048), id="wide MoE"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


STEPS = {"vectors": decode_cpu.decode_one_token,
         "what the kernels compute": partial(decode_gpu.decode_one_token, decode_ops)}


def smallest_margin(model, ids):
    """How clearly the routers prefer the last expert they take to the next; 1 without routers."""
    margins = [1.0]

    def note(router, inputs, output):
        ranked = (inputs[0].float() @ router.weight_DE).sort(descending=True)[0]
        margins.append((ranked[:, router.k - 1] - ranked[:, router.k]).min().item())
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(note) for router in routers]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return min(margins)


def ids_with_decided_routers(model):
    """20 ids for which rounding does not choose the experts."""
    for seed in range(1000):
        ids = random_ids(20, seed)
        if smallest_margin(model, ids) >= 0.08:
            return ids
    raise AssertionError("no ids found")


def largest_error(model, step):
    """Of a step's logits for 15 tokens, against the modules' logits for the whole text.

    Returned beside the largest of these logits.
    """
    ids = ids_with_decided_routers(model)
    cache = GraphCache(model)
    generation.prefill(model, cache, [ids[:5]])
    logits = []
    for t in range(5, 20):
        token, position = torch.tensor([[ids[t]]]), torch.tensor([[t]])
        logits.append(step(model, cache, token, position, t + 1))
    expected = model(torch.tensor([ids]))[0, 5:]
    return (torch.cat(logits) - expected).abs().max().item(), expected.abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
@torch.inference_mode()
def test_batch_size_1_equals_the_modules(step, kind, dtype):
    model = model_for_decoding(dtype, **kind)

    error, largest = largest_error(model, STEPS[step])

    assert error < (1e-5 if dtype == torch.float32 else 0.02 * largest)


def place_of(prompts, t):
    """The positions (B, 1) of each row's t-th token after its prompt."""
    return torch.tensor([[len(prompt) + t] for prompt in prompts])


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_what_the_kernels_compute_equals_the_modules_in_a_batch(kind):
    """Rows of different lengths; the second has ended, and writes to the padding's slot."""
    model = model_for_decoding(torch.float32, **kind)
    prompts = [random_ids(4 + 7 * b, seed=b) for b in range(4)]
    fast, plain = generation.KVCache(model, 4), generation.KVCache(model, 4)
    for cache in fast, plain:
        generation.prefill(model, cache, prompts)
    rows = [0, 2, 3]
    for t in range(5):
        token, position = torch.tensor([[9 * t + b] for b in range(4)]), place_of(prompts, t)
        position[1] = fast.size

        logits = decode_gpu.decode_one_token(decode_ops, model, fast, token, position)

        expected = generation.decode_one_token(model, plain, token, position, plain.size)
        assert (logits - expected)[rows].abs().max() < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_a_step_of_the_kernels_makes_the_tokens_of_the_plain_one(batch):
    model = model_for_decoding(torch.float32)
    prompts = [random_ids(4 + 7 * b, seed=b) for b in range(batch)]

    made = tokens_of(model, partial(decode_gpu.decode_step, decode_ops, None), prompts)

    plain = partial(generation.decode_step, end=model.config.block_size)
    assert made == tokens_of(model, plain, prompts)


def tokens_of(model, step, prompts):
    """The tokens that 12 calls of `step` make after `prompts`."""
    params = SamplingParams(temperature=2.0, top_k=20)
    cache = GraphCache(model, len(prompts))
    state = generation.DecodeState(model, len(prompts), cache.size)
    state.start(prompts, params, seed=1, stop_ids=())
    logits = generation.prefill(model, cache, prompts)
    generation.sample_next(state, logits, params)
    tokens = []
    for _ in range(12):
        step(model, cache, state, params)
        tokens.append(state.token[:, 0].tolist())
    return tokens


@dataclass(frozen=True)
class WithMinP(SamplingParams):
    min_p: float = 0.1


@pytest.mark.parametrize("params, vocab_size, can", [
    (SamplingParams(top_k=20), 32000, True),
    (SamplingParams(temperature=0), 300, True),
    (SamplingParams(), 32000, False),
    (SamplingParams(top_p=0.9), 32000, False),
    (SamplingParams(top_k=200), 32000, False),
    (SamplingParams(top_k=50), 300, False),
    (WithMinP(top_k=20), 32000, False),
], ids=str)
def test_which_settings_the_kernels_draw_from(params, vocab_size, can):
    """What they do not know, a new rule for instance, is left to sampling.py."""
    state = SimpleNamespace(seen=torch.zeros(1, vocab_size))

    assert decode_ops.can_draw(params, state) is can


def subtracted_penalty(patch):
    patch.setattr(generation, "penalize", lambda logits, seen, penalty: torch.where(
        seen, logits - penalty, logits))


def sharper_softmax(patch):
    plain = generation.sample
    patch.setattr(generation, "sample", lambda logits, u, temperature, *rest, **topk: plain(
        logits, u, temperature / 2, *rest, **topk))


@pytest.mark.parametrize("change", [subtracted_penalty, sharper_softmax])
def test_another_draw_leaves_the_kernels_draw_out(change, monkeypatch, capsys):
    assert fast_versions.draws_compiled(tiny_model())
    assert capsys.readouterr().err == ""
    change(monkeypatch)

    assert not fast_versions.draws_compiled(tiny_model())
    assert "sample_next of minillm/speed/decode_ops.py computes" in capsys.readouterr().err


def awkward_logits(size):
    """(5, size): random, the largest in one part, mostly -inf, many ties, random."""
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    logits[1, 64:128] += 9
    logits[2, 7:] = -float("inf")
    logits[3] = logits[3].round()
    return logits


@pytest.mark.parametrize("size", [100, 5000, 31999, 32000])
def test_topk_of_ours_is_topk(size):
    """With a row that falls into whole parts and not, and one too short for parts."""
    logits = awkward_logits(size)
    for k in (1, 6, 20, min(size, 300)):
        values, ids = topk_by_parts(logits, k)

        # which ids of equal logits are taken is open
        assert torch.equal(values, logits.topk(k)[0])
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("kind, batch, compile", [
    (DENSE, 1, False), (DENSE, 1, True), (DENSE, 3, True), (MOE, 1, True), (MOE, 12, False)])
def test_graphs_on_a_gpu_give_the_likeliest_token(kind, batch, compile, top_k):
    """Over four turns, prompt and answer from CUDA graphs in bfloat16.

    Each token is, within rounding, the likeliest without a cache.
    """
    model = tiny_model(**kind, n_embd=64, n_inner=64, block_size=96)
    model.for_generation(torch.device("cuda"), torch.bfloat16)
    draw = random.Random(0)
    prompts = [[draw.randrange(300) for _ in range(3 + 4 * b)] for b in range(batch)]
    cache = model.new_cache(batch)
    temperature = 1e-4 if top_k else 0
    for turn in range(4):
        steps = model.generate(list(map(list, prompts)), 6, temperature=temperature, top_k=top_k,
                               cache=cache, compile=compile)
        for step in steps:
            for prompt, token in zip(prompts, step):
                logits = model(torch.tensor([prompt]).cuda())[0, -1].float()
                assert logits.max() - logits[token] < 0.05 * (logits.max() - logits.min())
                prompt.append(token)
        for prompt in prompts:
            prompt += [draw.randrange(300) for _ in range(draw.randint(1, 9))]


def test_attention_takes_any_strides_of_the_kernel(monkeypatch):
    """A GPU's kernel for several rows of float32 returns (B, heads, T, D) as a view of another."""
    q, k = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 5, 8)
    visible = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    expected = attention.cached_attention(q, k, k, visible)
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: kernel(
        *args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2))

    torch.testing.assert_close(attention.cached_attention(q, k, k, visible), expected)
