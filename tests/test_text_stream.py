"""Text from ids as they come: whole characters only, and nothing from a stop string on."""
import random

import pytest

from minillm.text_stream import TextStream
from support.tiny_models import tiny_model
from support.tiny_tokenizer import VOCAB, tokenizer

HELLO = [{"role": "user", "content": "你好"}]
CHARACTERS = "😀🏽 你好é\u0301𠀀龘\n"
REPLACEMENT = "\ufffd"


def pieces_of(ids, stop=()):
    stream = TextStream(tokenizer(), stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return pieces + [stream.flush()]


def broken_ids(draw):
    """Mostly broken UTF-8: random ids, or a text of which some tokens are lost."""
    if draw.random() < 0.5:
        return draw.choices(range(VOCAB), k=draw.randrange(1, 40))
    ids = tokenizer().encode(draw.choice(CHARACTERS) * 9 + "世界")
    return [token for token in ids if draw.random() < 0.9]


def test_no_stream_shows_half_a_character():
    """All that is whole comes out, in order, and nothing else."""
    draw = random.Random(0)
    n_clean = 0
    for _ in range(600):
        ids = broken_ids(draw)
        data = b"".join(tokenizer().token_bytes[token] for token in ids)
        n_clean += data.decode("utf-8", "replace") == data.decode("utf-8", "ignore")
        for stop in ((), ("你",), ("\n\n", "界")):
            assert not any(REPLACEMENT in piece for piece in pieces_of(ids, stop))

        assert "".join(pieces_of(ids)) == data.decode("utf-8", "ignore")
    assert 0 < n_clean < 600


def test_a_replacement_character_in_the_text_is_text():
    ids = tokenizer().encode(f"a{REPLACEMENT}b")

    assert "".join(pieces_of(ids)) == f"a{REPLACEMENT}b"


@pytest.mark.parametrize("seed", range(4))
def test_streams_of_a_model_show_no_half_characters(seed):
    model = tiny_model(block_size=256)

    pieces = list(model.chat(HELLO, stream=True, max_new_tokens=200, temperature=3.0, top_k=0,
                             seed=seed))

    assert pieces and all(piece and REPLACEMENT not in piece for piece in pieces)


def until_stopped(text, stop):
    """`text` before the stop string that is complete first; of two at once, the longer."""
    for end in range(len(text) + 1):
        starts = [text[:end].find(string) for string in stop if string in text[:end]]
        if starts:
            return text[:min(starts)]
    return text


def test_stop_strings():
    """Stop strings that overlap themselves and each other, over every way to cut into tokens."""
    draw = random.Random(2)
    n_stopped = 0
    for _ in range(1500):
        text = "".join(draw.choices("aab你好\n", k=draw.randrange(14)))
        stop = ["".join(draw.choices("ab你\n", k=draw.randrange(1, 4)))
                for _ in range(draw.randrange(3))]
        # one byte a token, so that characters come in halves as well
        ids = [tokenizer().token_bytes.index(bytes([byte])) for byte in text.encode()]
        expected = until_stopped(text, stop)

        assert "".join(pieces_of(ids, stop)) == expected, (text, stop)
        n_stopped += expected != text
    assert 300 < n_stopped < 1300


def test_of_two_stop_strings_that_have_begun_the_longer_is_held_back():
    ids = tokenizer().encode("aab")

    for stop in (("aab", "ab"), ("ab", "aab")):
        assert "".join(pieces_of(ids, stop)) == ""


def test_nothing_is_shown_after_a_stop_string():
    """Whoever does not look at `stopped` at once gets no text either."""
    stream = TextStream(tokenizer(), ["b"])

    pieces = [stream.push(token) for token in tokenizer().encode("a b c")]

    assert stream.stopped and "".join(pieces) + stream.flush() == "a "


@pytest.mark.parametrize("form", [str, lambda stop: [stop, "never said"]], ids=["one", "several"])
def test_stop_string_ends_the_answer_and_stays_out_of_it(form):
    model = tiny_model(block_size=256)
    options = dict(max_new_tokens=60, seed=1)
    free = model.chat(HELLO, **options)
    stop = free[8:10]

    answer = model.chat(HELLO, stop=form(stop), **options)

    assert answer == free[:free.index(stop)]
