"""What serve.py's page makes of responses: cut anywhere, broken off, refused; and what it sends."""
import json

import pytest

from support.chat_page import (ERROR, TEXTS, USED, browser, click, fill, open_page, page, say,
                               server, tool)
from support.tiny_models import talkative, tiny_model
from support.web_server import served


def chunk(text="", **end):
    return {"choices": [{"delta": {"content": text}, "finish_reason": None} | end]}


def ending(forgotten=0):
    return chunk(finish_reason="stop", seed=3, forgotten_messages=forgotten)


NUMBERS = {"choices": [], "usage": {"completion_tokens": 9, "total_tokens": 20}}


def respond(page, *events, size=10**6, done=True):
    """Give the page these events, in pieces of `size` bytes, whatever it asks from now on.

    Its requests are in `sent`.
    """
    stream = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    data = (stream + "data: [DONE]\n\n" * done).encode()
    pieces = [list(data[start: start + size]) for start in range(0, len(data), size)]
    page.run(f"""window.sent = [], window.fetch = async (path, options) => {{
        sent.push(JSON.parse(options.body));
        return new Response(new ReadableStream({{ start(stream) {{
            for (const piece of {pieces}) stream.enqueue(new Uint8Array(piece));
            stream.close();
        }} }}));
    }}, 0""")


@pytest.mark.parametrize("size", [1, 7])
def test_a_response_may_be_cut_anywhere(page, size):
    """Between two events, inside one, and inside a character."""
    respond(page, chunk("你"), chunk("好\n\n"), chunk("data: 吗"), ending(), NUMBERS, size=size)

    say(page, "问")

    assert page.run(TEXTS) == ["问", "你好\n\ndata: 吗"] and page.run(ERROR) is None
    assert page.run(USED) == "20 / 128"


def test_the_speed_is_in_tokens_per_second(page):
    """From the question to the last token: here two seconds."""
    respond(page, chunk("好"), ending(), NUMBERS)
    page.run("let calls = 0; performance.now = () => 2000 * calls++")

    say(page, "问")

    assert "seed 3 · 9 tokens · 5 tokens/s" in page.run("$('messages').textContent")


def test_messages_that_the_model_no_longer_sees_are_marked(page):
    """Counted without the system prompt and without what was never sent."""
    click(page, "#gear")
    fill(page, "#system", "诗")
    respond(page, done=False)
    say(page, "一")                               # the answer to it has no text
    respond(page, chunk("好"), ending())
    say(page, "二")
    respond(page, chunk("好"), ending(forgotten=2))

    say(page, "三")

    marked = page.run("[...document.querySelectorAll('.message')]"
                      ".map(message => message.classList.contains('forgotten'))")
    assert page.run(TEXTS) == ["一", "", "二", "好", "三", "好"]
    assert marked == [True, False, True, False, False, False]
    sent = [message["content"] for message in page.run("sent[0].messages")]
    assert sent == ["诗", "一", "二", "好", "三"]


def test_each_retry_is_another_draw(page):
    click(page, "#gear")
    fill(page, "#seed", "5")
    respond(page, chunk("好"), ending())
    say(page, "问")

    for _ in range(2):
        tool(page, "Retry", 1)
        page.wait("!runs.size")

    assert [request["seed"] for request in page.run("sent")] == [5, 6, 7]


def test_an_option_that_is_emptied_is_sent_no_more(page):
    click(page, "#gear")
    fill(page, "#temperature", "0.5")
    fill(page, "#temperature", "")
    respond(page, chunk("好"), ending())

    say(page, "问")

    assert set(page.run("sent[0]")) == {"messages", "stream", "stream_options"}


def test_a_long_answer_is_followed_to_its_end_unless_somebody_reads_above(page):
    respond(page, chunk("行\n" * 100), chunk("行\n" * 100), ending())
    say(page, "问")
    assert page.run("atEnd()")

    page.run("$('scroll').scrollTop = 50, draw()")

    assert page.run("$('scroll').scrollTop") == 50


# ---- what goes wrong

@pytest.mark.parametrize("events", [[], [chunk("好")], [chunk("好"), ending()]])
def test_a_stream_that_breaks_off_is_said_so(page, events):
    respond(page, *events, done=False)

    say(page, "问")

    assert page.run(ERROR) == "The connection broke."
    assert page.run(TEXTS) == ["问", "好" if events else ""]


def test_a_server_that_is_gone_is_a_broken_connection(page):
    page.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch')), 0")

    say(page, "问")

    assert page.run(ERROR) == "The connection broke."


def test_an_error_inside_a_stream_is_shown(page):
    respond(page, chunk("好"), {"error": {"message": "the server made a mistake"}})

    say(page, "问")

    assert page.run(ERROR) == "the server made a mistake" and page.run(TEXTS) == ["问", "好"]


def test_an_answer_that_is_stopped_before_it_begins_leaves_nothing(page):
    page.run("""window.fetch = (path, options) => new Promise((_, fail) => {
        options.signal.onabort = () => fail(options.signal.reason); }), 0""")
    say(page, "问", wait="runs.size")

    click(page, "#send")
    page.wait("!runs.size")

    assert page.run(TEXTS) == ["问"] and page.run(ERROR) is None
    respond(page, chunk("好"), ending())
    tool(page, "Retry", 0)
    page.wait("!runs.size")
    assert page.run(TEXTS) == ["问", "好"]


def test_a_key_is_asked_for_once(browser):
    ask = "window.asked = 0, window.prompt = () => (asked++, 'secret')"
    script = browser.order("Page.addScriptToEvaluateOnNewDocument", source=ask)
    with served(talkative(tiny_model(block_size=128)), api_key="secret") as server:
        try:
            open_page(browser, server)
            assert browser.run("asked") == 1
            say(browser, "你好")
            assert browser.run(TEXTS)[1] and browser.run(ERROR) is None

            open_page(browser, server)

            assert browser.run("asked") == 0
        finally:
            browser.order("Page.removeScriptToEvaluateOnNewDocument", **script)
    browser.errors.clear()                       # a browser logs the 401
