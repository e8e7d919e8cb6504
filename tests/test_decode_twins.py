"""Decoding's fast twins in minillm/speed give what the plain modules and torch.topk give."""
import random
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from minillm import attention, generation
from minillm.sampling_params import SamplingParams
from minillm.speed import cuda_graph, decode_cpu, decode_gpu
from minillm.speed.cuda_graph import DECODE_OPTIONS, GraphCache
from minillm.speed.fused import row_terms
from minillm.speed.topk import topk_by_counting, topk_by_parts, topk_compiled
from moe import Router
from support.tiny_models import tiny_model
from support.uncached import DENSE, MOE, random_ids

CPU = torch.device("cpu")
COMPILED = [
    pytest.param({}, id="dense"),
    pytest.param(dict(bias=True), id="bias"),
    pytest.param(dict(n_expert=4, n_expert_per_tok=2), id="MoE"),
    pytest.param(dict(n_expert=4, n_expert_per_tok=1), id="one expert per token"),
]
KINDS = COMPILED + [
    pytest.param(dict(n_head=2, n_kv_head=2), id="wide heads"),
    pytest.param(dict(n_inner=2048), id="wide FFN"),
    pytest.param(dict(n_expert=4, n_expert_per_tok=2, n_inner=2048), id="wide MoE"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run_vector_parts(model, cache, token, position, end):
    return decode_gpu.run_parts(decode_gpu.VECTOR, model, cache, token, position)


STEPS = {"vectors": decode_cpu.decode_one_token, "for a compiler": run_vector_parts}


def model_for_decoding(dtype, **kind):
    model = tiny_model(**kind)
    for parameter in model.parameters():
        # norms of 1 and biases of 0 would hide that they are left out
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) / 4
    return model.for_generation(CPU, dtype)


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


@pytest.mark.parametrize("kind", COMPILED)
@torch.inference_mode()
def test_batch_size_1_compiled_equals_the_modules(kind):
    model = model_for_decoding(torch.float32, **kind)
    # the one option of these that a CPU has too
    name = "realize_acc_reads_threshold"
    options = {name: DECODE_OPTIONS[name]}
    parts = decode_gpu.compile_parts(decode_gpu.VECTOR, options)

    def step(model, cache, token, position, end):
        return decode_gpu.run_parts(parts, model, cache, token, position)
    error, _ = largest_error(model, step)

    assert error < 1e-5


@pytest.mark.parametrize("columns, folded", [
    (100, 100), (1024, 1024), (1536, 1536), (2048, 1024), (2049, 2049)])
def test_rows_are_folded_to_1024_columns_where_that_divides_them(columns, folded):
    """In float32: products of bfloat16 are exact there, as are these sums of whole numbers."""
    weight, x = torch.randint(-99, 99, (3, columns)).bfloat16(), torch.arange(columns) % 7 - 3.0

    terms = row_terms(weight, x.bfloat16())

    assert terms.shape == (3, folded) and terms.dtype == torch.float32
    assert torch.equal(terms.sum(1), (weight.double() @ x.double()).float())


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


@pytest.mark.parametrize("batch, kind", [
    (1, {}), (3, dict(n_expert=4, n_expert_per_tok=2))], ids=["one row", "a batch, MoE"])
@torch.inference_mode()
def test_a_step_compiled_in_parts_makes_the_tokens_of_the_plain_one(batch, kind):
    """With three layers, which share a part."""
    model = model_for_decoding(torch.float32, n_layer=3, **kind)
    prompts = [random_ids(4 + 7 * b, seed=b) for b in range(batch)]
    compiled = decode_gpu.compile_step(batch, options=None, tuned=None)

    made = tokens_of(model, compiled, prompts)

    plain = partial(generation.decode_step, end=model.config.block_size)
    assert made == tokens_of(model, plain, prompts)


def eager(monkeypatch):
    """torch.compile without its slow half."""
    torch._dynamo.reset()
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options, **how: torch_compile(
        function, backend="eager", **how))


@torch.inference_mode()
def test_any_number_of_settings_and_sizes_is_compiled(monkeypatch):
    """torch allows 8 graphs of a function, then stops with an error."""
    eager(monkeypatch)
    monkeypatch.setattr(cuda_graph, "capture", lambda function: (function, function()))
    model = model_for_decoding(torch.float32)
    for n in range(10):
        cache = GraphCache(model, 1, 20 + n)
        state = generation.DecodeState(model, 1, cache.size)
        params = SamplingParams(5, temperature=0.5 + n / 10)
        state.start([[5, 6, 7]], params, 1, ())

        cuda_graph.capture_decode(model, cache, state, params, compile=True)


def awkward_logits(size):
    """(5, size): random, the largest in one part, mostly -inf, many ties, random."""
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    logits[1, 64:128] += 9
    logits[2, 7:] = -float("inf")
    logits[3] = logits[3].round()
    return logits


@pytest.mark.parametrize("topk, size", [
    (topk_by_counting, 100), (topk_by_counting, 2048), (topk_by_parts, 100),
    (topk_by_parts, 5000), (topk_by_parts, 31999), (topk_by_parts, 32000),
    (topk_compiled, 5000), (topk_compiled, 32000)])
@pytest.mark.parametrize("rows", [5, 15])
def test_topk_of_ours_is_topk(topk, size, rows):
    """With a row that falls into whole parts and not, and one too short for parts."""
    logits = awkward_logits(size).repeat(rows // 5, 1)
    for k in (1, 6, 20, min(size, 300)):
        values, ids = topk(logits, k)

        # which ids of equal logits are taken is open
        assert torch.equal(values, logits.topk(k)[0])
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == k for row in ids.tolist())


@torch.inference_mode()
def test_compiled_attention_reads_the_filled_blocks():
    """Positions on both sides of a block's edge, and slots that end inside a block.

    Eagerly, flex_attention looks at the mask alone; compiled, it skips whole blocks as well.
    """
    position = torch.tensor([0, 5, 63, 64, 127, 128, 207])[:, None]
    q = torch.randn(7, 4, 1, 16)
    k, v = torch.randn(2, 7, 2, 208, 16)
    visible = (torch.arange(208) <= position)[:, None, None]

    @partial(torch.compile, fullgraph=True, dynamic=False)
    def attend(q, k, v, position):
        blocks = decode_gpu.filled_blocks(position, slots=208)
        return decode_gpu.flex_cached_attention(q, k, v, position, blocks)

    torch.testing.assert_close(attend(q, k, v, position),
                               attention.cached_attention(q, k, v, visible))


def test_attention_counts_only_filled_blocks():
    count, numbers = decode_gpu.filled_blocks(torch.tensor([[0], [63], [64], [200]]), slots=208)

    assert count.flatten().tolist() == [1, 1, 2, 4]
    assert numbers.shape == (4, 1, 1, 4)
    assert numbers[2].flatten().tolist() == [0, 1, 2, 3]


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
