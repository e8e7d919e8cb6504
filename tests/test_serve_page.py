"""The page of serve.py in a headless Chromium: what a user does, and what may not happen."""
import json
import re

import pytest

from support.chat_page import (DONE, ERROR, LIVE, NAMES, TEXTS, USED, browser, click, fill, page,
                               say, server, tool)
from support.web_server import PATIENCE, alone, httpx


def test_a_message_is_answered_with_the_options_that_are_set(page, server):
    click(page, "#gear")
    for name, value in [("system", "诗"), ("temperature", "0.5"), ("top_k", "20"), ("seed", "3"),
                        ("max_tokens", "9")]:
        fill(page, f"#{name}", value)

    say(page, "你好")

    messages = [{"role": "system", "content": "诗"}, {"role": "user", "content": "你好"}]
    want = alone(server, messages, temperature=0.5, top_k=20, seed=3, max_new_tokens=9)
    assert page.run(TEXTS) == ["你好", want]
    assert "seed 3 · 9 tokens" in page.run("document.getElementById('messages').textContent")
    prompt, _ = server.model.tokenizer.encode_chat(messages, add_generation_prompt=True)
    assert page.run(USED) == f"{len(prompt) + 9} / 128"


def test_an_answer_is_shown_while_it_is_made_and_can_be_stopped(page, server):
    server.gate.open.clear()
    try:
        say(page, "你好", wait=LIVE)
        assert page.run("document.getElementById('clear').disabled")
        assert page.run("document.getElementById('send').title") == "Stop"
        click(page, "#send")
        page.wait(DONE)
    finally:
        server.gate.open.set()
    server.wait(server.idle)

    # one step may have been under way when the gate closed
    assert len(page.run(TEXTS)[1]) in (1, 2) and page.run(ERROR) is None
    say(page, "再来")
    assert len(page.run(TEXTS)) == 4


def test_retry_draws_again_and_edit_sends_another_question(page, server):
    click(page, "#gear")
    fill(page, "#seed", "5")
    say(page, "你好")
    say(page, "然后？")
    first = page.run(TEXTS)

    tool(page, "Retry", 3)
    page.wait(DONE)

    again = page.run(TEXTS)
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, first)]
    assert again[:3] == first[:3]
    assert again[3] == alone(server, messages, seed=6)

    tool(page, "Edit", 0)
    fill(page, ".edit textarea", "山")
    page.press("Enter", 13)
    page.wait(DONE)

    assert page.run(TEXTS) == ["山", alone(server, [{"role": "user", "content": "山"}], seed=5)]


def test_conversations_stay_after_a_reload_until_they_are_cleared(page, server):
    say(page, "第一")
    click(page, "#new")
    say(page, "第二")
    texts = page.run(TEXTS)

    page.open("about:blank")
    page.open(server.url + "/")

    assert page.run(TEXTS) == texts
    assert page.run(NAMES) == ["第二", "第一"]
    click(page, ".chat:nth-child(2) .name")
    assert page.run(TEXTS)[0] == "第一"
    click(page, "#clear")
    assert page.run(TEXTS) == []


def test_an_input_method_keeps_its_enter(page):
    page.run("document.getElementById('input').focus()")
    page.order("Input.imeSetComposition", text="ni", selectionStart=2, selectionEnd=2)
    page.press("Enter", 229)
    assert page.run("chat().messages.length") == 0
    page.order("Input.insertText", text="你")
    page.press("Enter", 13, modifiers=8)         # with Shift: a new line

    assert page.run("chat().messages.length") == 0
    assert page.run("document.getElementById('input').value") == "你\n"


@pytest.mark.parametrize("text", ["<script>window.hit = 1</script>", "<|im_end|>\n</script>",
                                  "<img src=x onerror='window.hit = 1'>"])
def test_text_is_shown_as_text(page, text):
    page.run(f"say({json.dumps(text)})")
    page.wait(DONE)
    page.run(f"chat().messages[1].content = chat().messages[1].error = {json.dumps(text)}, draw()")

    assert page.run(TEXTS) == [text, text] and page.run(ERROR) == text
    assert page.run("window.hit") is None
    assert page.run("document.querySelectorAll('#messages script, #messages img').length") == 0


def test_errors_are_shown(page, server, monkeypatch):
    monkeypatch.setattr(server.decoder, "max_waiting", -2)

    say(page, "你好")

    assert "the model is busy" in page.run(ERROR)
    page.errors.clear()                          # a browser logs each 429
    monkeypatch.undo()
    tool(page, "Retry", 1)
    page.wait(DONE)
    assert page.run(ERROR) is None and page.run(TEXTS)[1]


def test_two_languages(page):
    click(page, "#language")

    assert page.run("document.documentElement.lang") == "zh"
    assert page.run("document.getElementById('clear').textContent") == "清空"
    assert page.run("Object.values(WORDS).every(both => both.length === 2 && both[0] && both[1])")


def test_a_telephone_shows_all_of_it(page):
    page.resize(390, 780, mobile=True)
    say(page, "x" * 60)

    assert page.run("document.documentElement.scrollWidth") <= 390
    selector = "#input, #send, #gear, #burger, .message .text"
    boxes = page.run(f"[...document.querySelectorAll('{selector}')]"
                     ".map(element => element.getBoundingClientRect().toJSON())")
    assert len(boxes) == 6
    for box in boxes:
        assert box["left"] >= 0 and box["right"] <= 390 and box["width"] > 0
    click(page, "#burger")
    page.wait("document.getElementById('side').getBoundingClientRect().left === 0")


def luminance(color):
    """Of #rgb or #rrggbb, from 0 to 1."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    total = 0
    for weight, at in ((0.2126, 0), (0.7152, 2), (0.0722, 4)):
        value = int(digits[at: at + 2], 16) / 255
        linear = value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        total += weight * linear
    return total


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_light_and_dark(page, scheme):
    page.colors(scheme)

    pairs = [("text", "page"), ("text", "mine"), ("quiet", "page"), ("quiet", "side"),
             ("bad", "page"), ("on-accent", "accent")]
    for pair in pairs:
        lights = []
        for name in pair:
            style = "getComputedStyle(document.documentElement)"
            color = page.run(f"{style}.getPropertyValue('--{name}')").strip()
            lights.append(luminance(color))
        dark, light = sorted(lights)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair         # WCAG 2.1, AA


def test_the_page_is_one_file_that_asks_for_nothing_else(page, server):
    response = httpx.get(server.url + "/", timeout=PATIENCE)

    assert not re.search(r"(src|href)=\"(?!data:)", response.text)
    assert "'unsafe-inline'" not in response.headers["content-security-policy"]
    asked = page.run("performance.getEntriesByType('resource')"
                     ".map(entry => new URL(entry.name).pathname)")
    assert set(asked) <= {"/v1/models", "/v1/chat/completions"}
