"""BatchDecoder by itself: whom it notifies, and when."""
import threading

import pytest

from minillm import batch_decoder
from minillm.batch_decoder import Answer, BatchDecoder
from minillm.sampling_params import SamplingParams
from support.processes import LIMIT
from support.tiny_models import talkative, tiny_model


def text_prompt(ids):
    return None if ids else [0, 5, 6, 7]


def decode_all(model, answers, rows=2):
    """Decode `answers`. Returns a list per notification of (answer's number, text, finish)."""
    news, ended = [], threading.Event()

    def notify(told):
        news.append([(answers.index(answer), answer.take(), answer.finish) for answer in told])
        if all(answer.finish for answer in answers):
            ended.set()
    decoder = BatchDecoder(model, model.new_cache(rows), len(answers), notify)
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
