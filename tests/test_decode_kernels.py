"""Decoding's Triton kernels compute what decode_ops.py and generation.sample_next do.

On a GPU, or where `pip install triton` was run, on a CPU, by Triton's interpreter.
"""
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from support.own_process import GPUS

ON_GPU = bool(GPUS)
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"         # before Triton is imported
pytest.importorskip("triton", reason="needs Triton, which torch brings along on Linux with CUDA")

from minillm import generation
from minillm.answer import STOP_IDS, Answer
from minillm.sampling_params import SamplingParams
from minillm.speed import (cuda_graph, decode_gpu, decode_kernels, decode_ops, draw_kernels,
                           matmul_kernels)
from minillm.speed.grouped_mm import lay_out_for_decoding
from minillm.speed.launch import launch
from support.decode_all import decode_all, run_now
from support.tiny_models import model_for_decoding
from support.uncached import random_ids

pytestmark = [pytest.mark.gpu] if ON_GPU else []
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
KINDS = {
    "dense": {},
    "bias": dict(bias=True),
    "MoE": dict(n_expert=4, n_expert_per_tok=2),
    "one expert per token": dict(n_expert=4, n_expert_per_tok=1),
    "no powers of two": dict(n_head=6, n_kv_head=3, n_embd=6 * 20, n_inner=88),
    "MoE without powers of two": dict(n_expert=5, n_expert_per_tok=3, n_embd=40, n_inner=72),
    "one group": dict(n_head=4, n_kv_head=1),
    "no groups": dict(n_head=2, n_kv_head=2),
    "pieces": dict(n_embd=64, n_inner=2048),
    "many experts": dict(n_expert=200, n_expert_per_tok=6, n_layer=1, n_inner=16),
}


def model_for_kernels(dtype=torch.float32, **kind):
    model = model_for_decoding(dtype, DEVICE, **{"block_size": 160} | kind)
    for _, moe in model.moe_layers():
        lay_out_for_decoding(moe)
    return model


def largest_error(model, prompts, steps, padding=()):
    """Of the kernels' logits against those of decode_ops.py, relative to the largest of these.

    padding: rows whose last step stands at the padding's position.
    """
    B, errors = len(prompts), []
    caches = generation.KVCache(model, B), generation.KVCache(model, B)
    for cache in caches:
        generation.prefill(model, cache, prompts)
    rows = [b for b in range(B) if b not in padding]
    for t in range(steps):
        token = torch.tensor([[(37 * t + 11 * b) % 300] for b in range(B)], device=DEVICE)
        position = torch.tensor([[len(prompt) + t] for prompt in prompts], device=DEVICE)
        position[list(padding)] = caches[0].size
        found, expected = [
            decode_gpu.decode_one_token(ops, model, cache, token, position)[rows]
            for ops, cache in zip((decode_kernels, decode_ops), caches)]
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
    return max(errors)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_kernels_compute_what_the_plain_operations_do(kind):
    model = model_for_kernels(**KINDS[kind])
    prompts = [random_ids(9 + 61 * b, seed=b) for b in range(3)]

    assert largest_error(model, prompts[:1], steps=3) < 1e-4
    assert largest_error(model, prompts, steps=3) < 1e-4


def test_where_kernels_cannot_overlap_triton_is_not_asked_to():
    """Triton for AMD ends with a KeyError where the option is given, even as False."""
    options = {}

    launch({(1,): lambda *args, **given: options.update(given)}, (1,), torch.zeros(1), WIDTH=1)

    assert options == dict(WIDTH=1, OVERLAP=False, num_warps=4)


@torch.inference_mode()
def test_one_row_at_the_edges_of_blocks_and_beyond_all_parts():
    model = model_for_kernels(block_size=640)

    for length in (1, 63, 64, 127, 600):
        assert largest_error(model, [random_ids(length, seed=2)], steps=2) < 1e-4


@torch.inference_mode()
def test_a_batch_at_the_edges_of_blocks_with_padding_between():
    prompts = [random_ids(length, seed=length) for length in (1, 31, 5, 32, 33, 150)]

    assert largest_error(model_for_kernels(), prompts, steps=2, padding=(2,)) < 1e-4


@torch.inference_mode()
def test_more_rows_than_a_program_takes():
    prompts = [random_ids(2 + b % 7, seed=b) for b in range(70)]

    assert largest_error(model_for_kernels(n_expert=4, n_layer=1), prompts, steps=2) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_in_16_bits_too(dtype):
    if dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter does not multiply bfloat16")
    model = model_for_kernels(dtype)
    prompts = [random_ids(9 + 20 * b, seed=b) for b in range(5)]

    assert largest_error(model, prompts[:1], steps=3) < 0.02
    assert largest_error(model, prompts, steps=3) < 0.02


@torch.inference_mode()
def test_attention_counts_the_memory_of_padded_heads(monkeypatch):
    """Heads of 20 channels take 32; on a GPU with little shared memory too much of it fails."""
    sizes = []
    monkeypatch.setattr(matmul_kernels, "stages", lambda device, size: sizes.append(size) or 1)
    model = model_for_kernels(n_layer=1, n_head=2, n_kv_head=1, n_embd=40, n_inner=16)

    assert largest_error(model, [random_ids(3, seed=1), random_ids(4, seed=2)], steps=1) < 1e-4
    # the keys and values of 32 slots, float32
    assert sizes[1] == 2 * 32 * 32 * 4


SETTINGS = {
    "greedy": dict(temperature=0),
    "top_k=1": dict(top_k=1),
    "top_k": dict(top_k=20, temperature=0.8),
    "top_k with top_p": dict(top_k=50, top_p=0.8, temperature=1.3),
    "a top_p below the first": dict(top_k=33, top_p=0.001),
    "penalty": dict(top_k=7, repetition_penalty=1.3),
    "greedy with penalty": dict(temperature=0, repetition_penalty=2.0),
    "the largest k": dict(top_k=decode_ops.MOST_CHOSEN),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_are_those_of_sample_next(name):
    """With more logits than tokens, of which none beyond the vocabulary is ever drawn."""
    params = SamplingParams(8, **SETTINGS[name])
    torch.manual_seed(1)
    for rows, vocab_size in ((1, 8192), (1, 40001), (3, 8192), (3, 40001)):
        u, seen = torch.rand(rows, 8), torch.rand(rows, vocab_size) < 0.3
        logits = 4 * torch.randn(rows, vocab_size + 24)
        logits[:, vocab_size:] = 99

        tokens, state = draws(draw_kernels.sample_next, logits, u, seen, params)
        expected, expected_state = draws(generation.sample_next, logits, u, seen, params)

        assert tokens == expected
        assert torch.equal(state.step, expected_state.step)
        assert torch.equal(state.seen, expected_state.seen)
        if params.repetition_penalty == 1:
            server = draw_kernels.sample(logits.to(DEVICE)[:, :vocab_size], u[:, 1].to(DEVICE),
                                         *params.for_sample())
            assert server.tolist() == expected[1]


def draws(sample_next, logits, u, seen, params):
    """(the tokens of some calls, the state that these leave)."""
    state = SimpleNamespace(
        token=torch.zeros(len(u), 1, dtype=torch.long, device=DEVICE), u=u.to(DEVICE),
        step=torch.zeros(1, dtype=torch.long, device=DEVICE), seen=seen.clone().to(DEVICE))
    assert decode_ops.can_draw(params, state)
    tokens = []
    for _ in range(u.shape[1] if ON_GPU else 2):
        sample_next(state, logits.to(DEVICE), params)
        tokens.append(state.token[:, 0].tolist())
    return tokens, state


def test_equal_logits_rank_by_their_place():
    logits = torch.zeros(2, 8192)
    logits[1, 4000:4020] = 1

    tokens, _ = draws(draw_kernels.sample_next, logits, torch.rand(2, 40),
                      torch.zeros(2, 8192, dtype=torch.bool), SamplingParams(top_k=4))

    assert {first for first, _ in tokens} <= set(range(4))
    assert {second for _, second in tokens} <= set(range(4000, 4004))


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(top_k=20)], ids=str)
def test_logits_that_are_not_finite_give_tokens_of_the_vocabulary(settings, monkeypatch):
    """A token beyond it would read outside of the embedding, which ends a program on a GPU."""
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(size, -1, **options))
    logits = torch.full((4, 8192), float("nan"))
    logits[1, :5000] = 1
    logits[2:] = torch.tensor([[-float("inf")], [float("inf")]])

    tokens, _ = draws(draw_kernels.sample_next, logits, torch.rand(4, 8),
                      torch.zeros(4, 8192, dtype=torch.bool), SamplingParams(**settings))

    assert all(0 <= token < 8192 for step in tokens for token in step)


@pytest.mark.skipif(not ON_GPU, reason="a CUDA graph")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind, settings", [
    ("dense", dict(top_k=20)), ("dense", dict(temperature=0.7)), ("MoE", dict(top_k=20))])
def test_long_answers_are_the_plain_ones(kind, settings, batch):
    """Hundreds of replays, in which a kernel that starts too early would read old numbers."""
    model = model_for_kernels(**KINDS[kind], n_embd=256, n_inner=512, block_size=400,
                              vocab_size=8192)
    prompts = [random_ids(5 + b, seed=b) for b in range(batch)]
    plain, fast = [list(model.generate(list(map(list, prompts)), 300, seed=3, compile=compile,
                                       **settings)) for compile in (False, True)]

    assert fast == plain


@pytest.mark.parametrize("n_expert", [0, 4])
def test_a_server_gives_the_text_of_an_answer_alone(monkeypatch, n_expert):
    """In rows that others have used, with settings that the kernels draw from and others."""
    if not ON_GPU:
        monkeypatch.setattr(cuda_graph, "capture", run_now)
    model = model_for_kernels(n_expert=n_expert, block_size=96)
    rows, cache = 4, model.new_cache(4)
    fast = {"span": partial(cuda_graph.power_of_two_rows, rows=rows),
            "decode": partial(cuda_graph.decode_rows, compile=True),
            "sample": cuda_graph.RecordedSample(rows, compile=True)}
    prompts = [random_ids(n, seed=n) for n in (30, 40, 29, 40, 20, 37)]
    settings = [dict(top_k=3), dict(temperature=0), dict(top_k=3, repetition_penalty=1.3), {}]
    params = [SamplingParams(6, **settings[i % 4]) for i in range(len(prompts))]
    answers = [Answer(model.tokenizer, lambda ids, p=p: p, params[seed], seed)
               for seed, p in enumerate(prompts)]

    decode_all(model, answers, rows, cache, warm=True, **fast)

    for seed, (prompt, answer) in enumerate(zip(prompts, answers)):
        alone = [ids for (ids,) in generation.generate(model, [prompt], params[seed], seed,
                                                       STOP_IDS)]
        assert answer.ids == [token for token in alone if token not in STOP_IDS]
