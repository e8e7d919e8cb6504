"""Which row of a BatchDecoder an answer gets, and whose turn it is; each step by hand."""
import pytest

from minillm import batch_decoder
from minillm.answer import Answer
from minillm.batch_decoder import BatchDecoder
from minillm.sampling_params import SamplingParams
from support.tiny_models import tiny_model
from support.tiny_tokenizer import tokenizer


def decoder_of(prompts, rows=2):
    """(a BatchDecoder that these prompts wait for, their answers)"""
    model = tiny_model()
    decoder = BatchDecoder(model, model.new_cache(rows), max_waiting=8)
    answers = [Answer(model.tokenizer, lambda ids, prompt=prompt: prompt, SamplingParams(9))
               for prompt in prompts]
    decoder.submit(answers)
    return decoder, answers


def test_a_later_turn_gets_the_row_that_holds_its_beginning():
    decoder, [answer] = decoder_of([[5, 6, 7, 8]])
    decoder.rows[0].cache.tokens = [[5, 1, 2, 3]]
    decoder.rows[1].cache.tokens = [[5, 6, 7, 9]]

    decoder._take_work()

    assert [row.answer for row in decoder.rows] == [None, answer] and answer.cached_tokens == 3


def test_who_came_first_is_read_first(monkeypatch):
    """Not who has the first row."""
    decoder, answers = decoder_of([[5, 6], [5, 7]])
    decoder._take_work()
    answers[0].started, answers[1].started = 2.0, 1.0
    read = []
    monkeypatch.setattr(decoder, "_read", lambda row: read.append(row.number))

    decoder._turn()

    assert read == [1]


def test_the_mean_time_of_an_answer_moves_a_tenth_of_the_way(monkeypatch):
    monkeypatch.setattr(batch_decoder.time, "monotonic", lambda: 100.0)
    decoder, [answer] = decoder_of([[5, 6]])
    decoder._take_work()
    decoder.mean_seconds, answer.started = 10.0, 80.0

    decoder._free(decoder.rows[0])

    assert decoder.mean_seconds == 11.0


def test_what_might_have_become_a_stop_is_shown_at_the_end():
    [token] = tokenizer().encode("a")
    answer = Answer(tokenizer(), lambda ids: [5], SamplingParams(1), stop=("ab",))

    answer.push(token)

    assert (answer.take(), answer.finish) == ("a", "length")


@pytest.mark.parametrize("rows, size", [(1, 2), (40, 8)])
def test_a_context_shorter_than_the_number_of_rows_is_warmed_up(rows, size):
    model = tiny_model(block_size=size)
    decoder = BatchDecoder(model, model.new_cache(rows), max_waiting=0)

    decoder.warm_up(SamplingParams())

    assert decoder.active == 0 and all(row.answer is None for row in decoder.rows)
