"""Sampling: the distribution that is drawn, the penalty, stop ids, seeds, options refused."""
import math
import re
from dataclasses import dataclass

import pytest
import torch

from minillm import generation
from minillm.answer import Answer
from minillm.batch_decoder import BatchDecoder
from minillm.errors import UserError
from minillm.sampling import mix, sample
from minillm.sampling_params import SamplingParams
from minillm.speed import cuda_graph
from support.tiny_models import tiny_model
from support.tiny_tokenizer import VOCAB
from support.uncached import GREEDY, random_ids, rows, uncached

HELLO = [{"role": "user", "content": "你好"}]


def probabilities(logits, temperature, top_k, top_p):
    """{id: probability} of the ids that the cuts leave."""
    weight = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    ranked = sorted(weight, key=lambda token: -weight[token])[:top_k or None]
    total = sum(weight[token] for token in ranked)
    kept, mass = {}, 0.0
    for token in ranked:
        if mass < top_p * total:
            kept[token] = weight[token]
        mass += weight[token]
    return {token: kept[token] / sum(kept.values()) for token in kept}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.0, 0, 0.3), (1.3, 6, 0.8),
    (1.0, 99, 1e-9)])
def test_sample_draws_the_distribution(temperature, top_k, top_p):
    """Over many u each id comes as often as its probability says, within 4 standard deviations."""
    logits = [1.5, -0.3, 0.2, 2.0, -1.0, 0.9, 0.1, -2.5]
    expected = probabilities(logits, temperature, top_k, top_p)
    n = 200_000
    u = torch.arange(n) / 2**18

    drawn = sample(torch.tensor([logits]).expand(n, -1), u, temperature, top_k, top_p)

    for token, count in enumerate(torch.bincount(drawn, minlength=len(logits)).tolist()):
        p = expected.get(token, 0)
        assert abs(count / n - p) <= 4 * (p * (1 - p) / n) ** 0.5, token


@pytest.mark.parametrize("options", [dict(), dict(top_k=50), dict(top_p=0.9)], ids=str)
def test_rounding_moves_few_choices(options):
    """Almost equal logits may change ranks by rounding; that alone draws no other id."""
    torch.manual_seed(0)
    logits, u = torch.randn(1000, 2000), torch.rand(1000)
    rounded = logits + 1e-3 * torch.randn_like(logits)
    changed_rank = (logits.topk(50)[1] != rounded.topk(50)[1]).any(1)
    assert changed_rank.float().mean() > 0.5

    moved = sample(logits, u, **options) != sample(rounded, u, **options)

    assert moved.float().mean() < 0.01


def test_sample_at_the_edges():
    logits = torch.tensor([[0.0, 5.0, -float("inf"), 5.0]])
    almost_one = torch.tensor([1 - 2**-24])
    for u in (torch.zeros(1), almost_one):
        for options in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-9)):
            assert sample(logits, u, **options).item() in (1, 3)
        for options in (dict(), dict(temperature=1e-3), dict(temperature=100.0), dict(top_k=1000),
                        dict(top_p=0.999)):
            assert sample(logits, u, **options).item() != 2
    assert sample(logits, almost_one, 1e-3).item() in (1, 3)


def test_a_certain_token_is_drawn_whatever_its_number():
    """The hash of this u and id is just below 2**32, which float32 rounds up to 2**32."""
    logits = torch.zeros(1, 200)
    logits[0, 29] = 1

    assert sample(logits, torch.tensor([34772 / 2**24]), temperature=1e-3).item() == 29


def test_a_token_without_probability_is_never_drawn_whatever_u_is():
    """For some ids there is a u whose hash is 0: the smallest exponential of all."""
    hashes = mix(torch.arange(1000) + 1)
    ids = (hashes < 2**24).nonzero()[:, 0]
    logits = torch.zeros(len(ids), 1000).scatter(1, ids[:, None], -float("inf"))

    drawn = sample(logits, hashes[ids] / 2**24)

    assert len(ids) > 0 and not (drawn == ids).any()


def test_top_p_takes_no_more_tokens_than_it_needs():
    """Two equal ones and top_p=0.5: one of them is enough, whatever u is."""
    u = torch.arange(1000) / 1000

    drawn = sample(torch.zeros(1000, 2), u, top_p=0.5)

    assert len(set(drawn.tolist())) == 1


def test_probabilities_are_computed_in_float32():
    """Logits in bfloat16, as a GPU leaves them, draw what the same numbers in float32 draw."""
    torch.manual_seed(0)
    logits, u = torch.randn(1000, 2000).bfloat16(), torch.rand(1000)

    assert torch.equal(sample(logits, u, 0.7), sample(logits.float(), u, 0.7))


def test_penalty_makes_what_was_said_less_likely():
    """In the prompt and in the answer, whichever sign a logit has."""
    model = tiny_model()
    prompt = random_ids(12, seed=1)
    sampled = dict(seed=2, repetition_penalty=5.0)

    plain = list(model.generate(prompt, 30, **GREEDY))
    damped = list(model.generate(prompt, 30, repetition_penalty=3.0, **GREEDY))

    assert damped == uncached(model, prompt, 30, repetition_penalty=3.0, **GREEDY)
    assert len(set(damped)) > len(set(plain))
    assert list(model.generate(prompt, 20, **sampled)) == uncached(model, prompt, 20, **sampled)


def test_penalty_spares_the_stop_ids():
    """Every id of the prompt is one: only the answer is damped."""
    model = tiny_model()
    prompt = random_ids(12, seed=1)
    for seed in range(20):
        options = dict(seed=seed, repetition_penalty=5.0, stop_ids=prompt)

        answer = list(model.generate(prompt, 20, **options))

        assert answer == uncached(model, prompt, 20, **options)


def test_stop_ids_end_each_row_by_itself():
    model = tiny_model()
    prompts = [random_ids(4, seed) for seed in range(8)]
    free = rows(model, prompts, 30, seed=4)
    stop_ids = (free[0][5], free[3][11])

    stopped = rows(model, prompts, 30, seed=4, stop_ids=stop_ids)

    for whole, cut in zip(free, stopped):
        ends = [i for i, token in enumerate(whole) if token in stop_ids]
        end = ends[0] if ends else 29
        assert cut == whole[:end + 1]
    assert len({len(row) for row in stopped}) > 1


def test_same_seed_same_ids():
    model = tiny_model()
    prompt = random_ids(5, seed=1)

    first = list(model.generate(prompt, 30, seed=11))

    assert list(model.generate(prompt, 30, seed=11)) == first
    assert list(model.generate(prompt, 9, seed=11)) == first[:9]          # whatever the length
    assert list(model.generate(prompt, 30, seed=12)) != first


def test_same_seed_same_answer():
    """Told whole or streamed, by this model or another with its weights."""
    model = tiny_model()
    options = dict(max_new_tokens=20, seed=3)

    answer = model.chat(HELLO, **options)

    assert "".join(model.chat(HELLO, stream=True, **options)) == answer
    assert tiny_model().chat(HELLO, **options) == answer


def test_without_a_seed_another_answer_each_time():
    model = tiny_model()
    assert len({model.chat(HELLO, max_new_tokens=20) for _ in range(4)}) > 1


@pytest.mark.parametrize("options", [GREEDY, dict(temperature=5.0)], ids=["greedy", "sampled"])
def test_rows_of_the_embedding_without_a_token_are_never_drawn(options):
    model = tiny_model(vocab_size=384)
    model.wte.weight[VOCAB:] = 5 * model.wte.weight[:84]

    answer = list(model.generate(random_ids(3, seed=1), 45, **options))

    assert len(answer) == 45 and max(answer) < VOCAB


BAD_OPTIONS = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -5),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
]


@pytest.mark.parametrize("name, value", BAD_OPTIONS)
def test_bad_options_are_refused(name, value):
    says = f"^{name}={re.escape(str(value))} must be"

    with pytest.raises(UserError, match=says):
        tiny_model().chat(HELLO, **{name: value})
    with pytest.raises(UserError, match=says):
        list(tiny_model().generate([5], **dict(max_new_tokens=3) | {name: value}))


@pytest.mark.parametrize("temperature", [1e-320, 1e-39, 1e-6])
@pytest.mark.parametrize("options", [dict(), dict(top_k=3), dict(top_p=0.9)], ids=str)
def test_a_temperature_beyond_float32_is_greedy(temperature, options):
    """logits / temperature would be infinite, and the probabilities no numbers."""
    logits = torch.tensor([[0.0, 5.0, 1.0, -3.0]])

    assert sample(logits, torch.tensor([0.3]), temperature, **options).tolist() == [1]


# ---- a rule of one's own: a field of SamplingParams, used in for_sample()

@dataclass(frozen=True)
class WithMinP(SamplingParams):
    min_p: float = 0.0

    def for_sample(self):
        return *super().for_sample(), self.min_p


def at_least(noted):
    """`sample` with one more setting, which it notes."""
    def sample_with_min_p(logits, u, temperature, top_k, top_p, min_p, topk=torch.topk):
        noted.append(min_p)
        return sample(logits, u, temperature, top_k, top_p, topk)
    return sample_with_min_p


def test_a_new_setting_reaches_generation(monkeypatch):
    noted = []
    monkeypatch.setattr(generation, "sample", at_least(noted))

    list(generation.generate(tiny_model(), [[5, 6, 7]], WithMinP(3, min_p=0.25)))

    assert noted == [0.25] * 3


def test_a_new_setting_parts_the_rows_of_a_server():
    """Rows are drawn together only where every setting but the length is the same."""
    noted, model = [], tiny_model()
    decoder = BatchDecoder(model, model.new_cache(3), 3, sample=at_least(noted))
    settings = [WithMinP(4, min_p=0.25), WithMinP(5, min_p=0.5), WithMinP(6, min_p=0.25)]
    for params in settings:
        decoder._join(Answer(model.tokenizer, lambda ids: [5, 6, 7], params))
    for row in decoder.rows:
        row.n_read = 3

    decoder._choose(decoder.rows, torch.zeros(3, VOCAB))

    assert sorted(noted) == [0.25, 0.5]


def test_a_new_setting_gets_a_graph_of_its_own(monkeypatch):
    monkeypatch.setattr(cuda_graph, "capture", lambda function: (function, function()))
    monkeypatch.setattr(generation, "sample", at_least([]))
    model = tiny_model()
    cache = cuda_graph.GraphCache(model)
    for params in WithMinP(4, min_p=0.25), WithMinP(4, min_p=0.5), WithMinP(9, min_p=0.5):
        state = generation.DecodeState(model, 1, cache.size)
        state.start([[5, 6, 7]], params, 1, ())
        cuda_graph.capture_decode(model, cache, state, params, compile=False)

    assert len(cache.decode_graphs) == 2
