"""BatchDecoder by itself: whom it notifies and when, and what it decodes on a GPU."""
import threading
from functools import partial

import pytest
import torch

from minillm import batch_decoder
from minillm.answer import Answer
from minillm.batch_decoder import BatchDecoder
from minillm.conversation import STOP_IDS
from minillm.generation import decode_one_token, generate
from minillm.sampling_params import SamplingParams
from minillm.speed import cuda_graph
from support.processes import LIMIT
from support.tiny_models import talkative, tiny_model


def text_prompt(ids):
    return None if ids else [0, 5, 6, 7]


def decode_all(model, answers, rows=2, cache=None, warm=False, **fast):
    """Decode `answers`. Returns a list per notification of (answer's number, text, finish)."""
    news, ended = [], threading.Event()

    def notify(told):
        news.append([(answers.index(answer), answer.take(), answer.finish) for answer in told])
        if all(answer.finish for answer in answers):
            ended.set()
    cache = cache or model.new_cache(rows)
    decoder = BatchDecoder(model, cache, len(answers), **fast)
    if warm:
        decoder.warm_up(SamplingParams())
    decoder.start(notify)
    try:
        decoder.submit(answers)
        assert ended.wait(LIMIT)
    finally:
        decoder.close()
    return news


def answers_of(model, count, max_new_tokens=20):
    params = SamplingParams(max_new_tokens)
    return [Answer(model.tokenizer, text_prompt, params, seed) for seed in range(count)]


def test_the_first_text_and_the_end_are_told_at_once(monkeypatch):
    monkeypatch.setattr(batch_decoder, "NEWS_PER_SECOND", 1e-6)
    model = talkative(tiny_model())
    answers = answers_of(model, count=3)

    news = decode_all(model, answers)

    for number, answer in enumerate(answers):
        told = [item for step in news for item in step if item[0] == number]
        texts, reasons = [text for _, text, _ in told], [reason for *_, reason in told]
        assert reasons == [None, "length"]
        assert 0 < len(texts[0]) <= len(model.tokenizer.decode(answer.ids[:2]))
        assert "".join(texts) == model.tokenizer.decode(answer.ids).replace("\ufffd", "")


def test_with_time_between_steps_every_token_is_told(monkeypatch):
    monkeypatch.setattr(batch_decoder, "NEWS_PER_SECOND", float("inf"))
    model = talkative(tiny_model())
    answers = answers_of(model, count=1)

    news = decode_all(model, answers)

    pieces = [text for step in news for _, text, _ in step]
    assert len(pieces) > 10 and all(pieces[:-1])


@pytest.mark.parametrize("rows, count", [(1, 3), (4, 6)])
def test_nobody_is_told_twice_of_the_end_or_of_nothing(rows, count):
    model = talkative(tiny_model())
    answers = answers_of(model, count)

    news = decode_all(model, answers, rows)

    assert all(news)
    told = [item for step in news for item in step]
    assert all(text or finish for _, text, finish in told)
    assert sorted(number for number, _, finish in told if finish) == list(range(count))


@pytest.mark.parametrize("ends_at_once", [False, True])
def test_warming_up_decodes_and_leaves_no_trace(ends_at_once):
    """Also with a model whose first token is the end: the step after it compiles, too."""
    model = tiny_model()
    if ends_at_once:
        model.logits = lambda x: torch.nn.functional.one_hot(
            torch.full(x.shape[:-1], STOP_IDS[0]), model.config.vocab_size).float() * 100
    steps, cold, warm = [], answers_of(model, count=3), answers_of(model, count=3)

    def decode(*arguments):
        steps.append(threading.current_thread().name)
        return decode_one_token(*arguments)
    decode_all(model, cold, decode=decode)
    in_warm_up = len(steps)
    decode_all(model, warm, decode=decode, warm=True)

    assert steps[in_warm_up] == "MainThread"
    assert set(steps[:in_warm_up] + steps[in_warm_up + 1:]) <= {"decoder"}
    assert [answer.ids for answer in warm] == [answer.ids for answer in cold]
    assert [answer.cached_tokens for answer in warm] == [answer.cached_tokens for answer in cold]


def run_now(function):
    """cuda_graph.capture without a GPU: replay() runs the function and overwrites its output."""
    output = function()
    return lambda: output.copy_(function()), output


@pytest.mark.parametrize("recorded", [False, True])
def test_a_prompt_with_nan_spoils_no_other(monkeypatch, recorded):
    """Neither in its row nor, on a GPU, in the graphs that read every prompt."""
    monkeypatch.setattr(cuda_graph, "capture", run_now)
    model = tiny_model(block_size=96)
    model.wte.register_forward_hook(lambda layer, inputs, output: torch.where(
        (inputs[0] == 50)[..., None], float("nan"), output))
    rows, cache, fast = 1, model.new_cache(1), {}
    if recorded:
        cache = cuda_graph.GraphCache(model, batch=1)
        fast = {"read": partial(cuda_graph.read_row, staging=cuda_graph.GraphCache(model)),
                "decode": cuda_graph.decode_rows}
    prompts = [[5, 6, 7], [9] * 30 + [50] * 20, [11, 12, 13], [15, 16]]
    params = SamplingParams(4, temperature=0)
    answers = [Answer(model.tokenizer, lambda ids, p=p: p, params, 1) for p in prompts]

    decode_all(model, answers, rows, cache, **fast)

    assert answers[1].finish == "error"
    for prompt, answer in zip(prompts, answers):
        if answer.finish != "error":
            alone = [ids for (ids,) in generate(model, [prompt], params, 1, STOP_IDS)]
            assert answer.ids == [token for token in alone if token not in STOP_IDS]
    assert [answer.finish for answer in answers].count("error") == 1


@pytest.mark.parametrize("n_expert", [0, 4])
def test_what_a_gpu_records_gives_the_text_of_an_answer_alone(monkeypatch, n_expert):
    """Prompts go through one row of graphs, and join rows that others have used."""
    monkeypatch.setattr(cuda_graph, "capture", run_now)
    monkeypatch.setattr(cuda_graph.RecordedSample, "MOST", 2)
    model = tiny_model(n_expert, block_size=96)
    rows, cache = 4, cuda_graph.GraphCache(model, batch=4)
    fast = {"read": partial(cuda_graph.read_row, staging=cuda_graph.GraphCache(model)),
            "span": partial(cuda_graph.power_of_two_rows, rows=rows),
            "decode": cuda_graph.decode_rows, "sample": cuda_graph.RecordedSample(rows)}
    # two kinds of prompts, so that a row's kept beginning is not the one read last
    lengths = (30, 40, 29, 40, 20, 37, 41, 43)
    prompts = [[*range(5 + 100 * (i % 2), 5 + 100 * (i % 2) + n)] for i, n in enumerate(lengths)]
    params = [SamplingParams(12, top_k=(0, 20, 30)[i % 3]) for i in range(len(prompts))]
    answers = [Answer(model.tokenizer, lambda ids, p=p: p, params[seed], seed)
               for seed, p in enumerate(prompts)]

    decode_all(model, answers, rows, cache, **fast)

    for seed, (prompt, answer) in enumerate(zip(prompts, answers)):
        alone = [ids for (ids,) in generate(model, [prompt], params[seed], seed, STOP_IDS)]
        assert answer.ids == [token for token in alone if token not in STOP_IDS]
    assert sum(answer.cached_tokens for answer in answers) > 0
