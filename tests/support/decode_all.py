"""A BatchDecoder from its start to the end of the last answer."""
import threading

from minillm.batch_decoder import BatchDecoder
from minillm.sampling_params import SamplingParams
from support.processes import LIMIT


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


def run_now(function):
    """cuda_graph.capture without a GPU: replay() runs the function and overwrites its output."""
    output = function()
    return lambda: output.copy_(function()), output
