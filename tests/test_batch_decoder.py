"""BatchDecoder by itself: whom it notifies and when, and what it decodes on a GPU."""
import threading
from dataclasses import asdict
from functools import partial

import pytest
import torch

from minillm import batch_decoder
from minillm.answer import STOP_IDS, Answer
from minillm.batch_decoder import BatchDecoder, Busy, Row
from minillm.conversation import Conversation
from minillm.generation import cached_forward, decode_one_token, generate
from minillm.sampling_params import SamplingParams
from minillm.speed import cuda_graph
from support.decode_all import decode_all, run_now
from support.processes import LIMIT
from support.tiny_models import talkative, tiny_model
from support.tiny_tokenizer import VOCAB, tokenizer


def text_prompt(ids):
    return None if ids else [0, 5, 6, 7]


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
    widths = set()

    def read(model, cache, idx, *rest):
        if threading.current_thread().name == "MainThread":
            widths.add(idx.shape[1])
        return cached_forward(model, cache, idx, *rest)

    def decode(*arguments):
        steps.append(threading.current_thread().name)
        return decode_one_token(*arguments)
    decode_all(model, cold, decode=decode)
    in_warm_up = len(steps)
    decode_all(model, warm, decode=decode, warm=True, read=read)

    assert widths == {1, 2, 4, 8, 16, 32, 47}                # of 48 tokens the answer has one
    assert steps[in_warm_up:][:2] == ["MainThread"] * 2      # with one row, and with both
    assert set(steps[:in_warm_up] + steps[in_warm_up + 2:]) <= {"decoder"}
    assert [answer.ids for answer in warm] == [answer.ids for answer in cold]
    assert [answer.cached_tokens for answer in warm] == [answer.cached_tokens for answer in cold]


@pytest.mark.parametrize("options", [
    dict(), dict(repetition_penalty=3.0), dict(temperature=0, repetition_penalty=1.5)], ids=str)
@pytest.mark.parametrize("seed", [5, 6])             # 6 ends in time where temperature is not 0
def test_an_answer_that_outgrows_the_context_is_that_of_a_conversation(seed, options):
    """Its prompt is replaced in the middle; the embedding has rows without a token, too."""
    model = tiny_model(block_size=90, vocab_size=VOCAB + 20)
    model.wte.weight[VOCAB:] *= 5
    params = SamplingParams(100, **options)
    conversations = []
    for _ in range(2):
        conversation = Conversation(model, "助手")
        for text in ("一", "好", "二", "好"):
            conversation.add("assistant" if text == "好" else "user", text)
        conversations.append(conversation)
    expected, served = conversations

    text = "".join(expected.ask("三", seed=seed, **asdict(params)))
    served.add("user", "三")
    answer = Answer(model.tokenizer, served.next_prompt, params, seed=seed)
    shown = "".join(piece for step in decode_all(model, [answer]) for _, piece, _ in step)

    assert (shown, answer.finish) == (text, expected.last["finish"])
    assert (answer.tokens, served.first) == (expected.last["tokens"], expected.first)
    assert answer.segment > 0 or answer.finish == "stop"


@pytest.mark.parametrize("seed", [2**64, -1])
def test_any_whole_number_is_a_seed(seed):
    model = tiny_model()
    params = SamplingParams(5)
    answer = Answer(model.tokenizer, text_prompt, params, seed)

    decode_all(model, [answer])

    alone = [ids for (ids,) in generate(model, [answer.prompt], params, seed, STOP_IDS)]
    assert answer.ids == [token for token in alone if token not in STOP_IDS]


def test_the_queue_takes_as_many_as_fit_and_no_more():
    """Two rows and one place to wait in. The decoder is not started: nothing ends."""
    decoder = BatchDecoder(tiny_model(), tiny_model().new_cache(2), max_waiting=1)
    answers = answers_of(decoder.model, count=4)

    decoder.submit(answers[:2])
    decoder._take_work()                         # both get a row
    decoder.check_room()
    decoder.submit(answers[2:3])
    for more in (decoder.check_room, lambda: decoder.submit(answers[3:])):
        with pytest.raises(Busy, match="busy with 3 answers"):
            more()

    decoder.cancel(answers[2])
    assert answers[2].finish == "cancelled"
    decoder.submit(answers[3:])


@pytest.mark.parametrize("seconds, after", [(0.01, 1), (7.2, 8), (1e6, 60)])
def test_who_is_refused_hears_when_to_come_back(seconds, after):
    decoder = BatchDecoder(tiny_model(), tiny_model().new_cache(1), max_waiting=0)
    decoder.mean_seconds = seconds

    with pytest.raises(Busy) as refused:
        decoder.submit(answers_of(decoder.model, count=2))

    assert refused.value.retry_after == after


def test_a_longer_queue_is_a_longer_wait():
    """Each row does its share of those who wait."""
    decoder = BatchDecoder(tiny_model(), tiny_model().new_cache(2), max_waiting=4)
    decoder.mean_seconds = 8
    answers = answers_of(decoder.model, count=7)
    decoder.submit(answers[:2])
    decoder._take_work()
    decoder.submit(answers[2:5])

    with pytest.raises(Busy) as refused:
        decoder.submit(answers[5:])

    assert refused.value.retry_after == 8 + 8 * 3 // 2


def test_a_cancelled_answer_leaves_its_row_to_the_next():
    """And of several free rows the first is taken: fewer rows are decoded."""
    decoder = BatchDecoder(tiny_model(), tiny_model().new_cache(2), max_waiting=4)
    first, second = answers_of(decoder.model, count=2)

    for answer in (first, second):
        decoder.submit([answer])
        decoder._take_work()
        assert [row.answer for row in decoder.rows] == [answer, None]
        decoder.cancel(answer)

    assert (first.finish, second.finish) == ("cancelled", None)


def test_the_penalty_spares_what_ends_an_answer():
    params = SamplingParams(repetition_penalty=2.0)
    answer = Answer(tokenizer(), lambda ids: [*STOP_IDS, 5, 6], params)
    row = Row(tiny_model().new_cache(1), 0)

    row.start(answer, VOCAB)

    assert row.seen.nonzero()[:, 0].tolist() == [5, 6]


def test_after_a_fault_nothing_that_its_row_held_is_used_again():
    model, faults = tiny_model(), [RuntimeError("a fault in one step")]

    def decode(*arguments):
        if faults:
            raise faults.pop()
        return decode_one_token(*arguments)
    params = SamplingParams(10)
    broken, same_prompt = (Answer(model.tokenizer, text_prompt, params, 1) for _ in range(2))

    decode_all(model, [broken, same_prompt], rows=1, decode=decode)

    alone = [ids for (ids,) in generate(model, [same_prompt.prompt], params, 1, STOP_IDS)]
    assert broken.finish == "error"
    assert same_prompt.ids == [token for token in alone if token not in STOP_IDS]


def test_an_answer_that_cannot_join_fails_and_the_next_is_served():
    """Its prompt is longer than a row, which nobody has checked."""
    model = tiny_model(block_size=48)
    params = SamplingParams(10)
    too_long = Answer(model.tokenizer, lambda ids: [5] * 49, params, 1)
    fits = Answer(model.tokenizer, text_prompt, params, 1)

    news = decode_all(model, [too_long, fits], rows=1)

    assert too_long.finish == "error" and (0, "", "error") in news[0]
    assert fits.ids and fits.finish != "error"


def test_a_fault_between_two_steps_ends_the_answers_at_work_and_no_other():
    model, params = tiny_model(), SamplingParams(10)
    answers = [Answer(model.tokenizer, text_prompt, params, 1) for _ in range(2)]
    decoder, ended = BatchDecoder(model, model.new_cache(1), max_waiting=2), threading.Event()
    inner, calls = decoder._take_work, []

    def take_work():
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("a fault between two steps")
        return inner()

    def notify(news):
        if all(answer.finish for answer in answers):
            ended.set()
    decoder._take_work = take_work
    decoder.start(notify)

    decoder.submit(answers)
    assert ended.wait(LIMIT)
    decoder.close()

    assert [answer.finish == "error" for answer in answers] == [True, False]


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
