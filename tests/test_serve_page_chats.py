"""The conversations of serve.py's page: which one is open, what is kept, what a click does."""
import json

import pytest

from support.chat_page import (DONE, LIVE, NAMES, TEXTS, USED, browser, click, fill, open_page,
                               page, say, server, tool)

HINT = "document.getElementById('hint').textContent"


@pytest.fixture
def shut(server):
    """The model makes no further token until the test ends."""
    server.gate.open.clear()
    yield
    server.gate.open.set()
    server.wait(server.idle)


def begin(page, *texts):
    """A conversation for each text, the last one on top and open; none of them is answered."""
    chats = [{"messages": [{"role": "user", "content": text}], "system": "", "used": 5}
             for text in texts]
    page.run(f"chats = [], {json.dumps(chats)}.forEach(one => add({{ ...one, id: newId() }})), "
             "state.current = '', save(...chats), show()")


def confirm(page, answer):
    page.run(f"window.confirm = question => (window.question = question, {json.dumps(answer)}), 0")


# ---- the list

def test_the_open_conversation_stays_open_when_another_is_deleted(page):
    begin(page, "一", "二", "三")
    click(page, ".chat:nth-child(2) .name")
    confirm(page, True)

    click(page, ".chat:nth-child(1) .drop")
    assert (page.run(NAMES), page.run(TEXTS)) == (["二", "一"], ["二"])
    click(page, ".chat:nth-child(2) .drop")
    assert (page.run(NAMES), page.run(TEXTS)) == (["二"], ["二"])

    click(page, ".drop")
    assert (page.run(NAMES), page.run(TEXTS)) == (["New"], [])


def test_nothing_is_deleted_unasked(page):
    begin(page, "一")
    confirm(page, False)

    click(page, ".drop")

    assert page.run("question") == "Delete this conversation?" and page.run(TEXTS) == ["一"]


def test_deleting_a_conversation_stops_its_answer(page, shut):
    say(page, "你好", wait=LIVE)
    page.run("window.signal = [...runs.values()][0].abort.signal, 0")
    confirm(page, True)

    click(page, ".drop")

    assert page.run("signal.aborted") and page.run(TEXTS) == []


def test_a_new_conversation_is_the_empty_one_where_there_is_one(page):
    begin(page, "一", "二")
    click(page, ".chat:nth-child(2) .name")
    click(page, "#clear")
    assert page.run(USED) == "0 / 128"
    click(page, ".chat:nth-child(1) .name")

    click(page, "#new")

    assert (page.run(NAMES), page.run(TEXTS)) == (["二", "New"], [])


def test_an_answer_is_made_while_another_conversation_is_edited(page, server, shut):
    begin(page, "别处")
    click(page, "#new")
    say(page, "你好", wait=LIVE)
    click(page, ".chat:nth-child(2) .name")
    tool(page, "Edit", 0)
    fill(page, ".edit textarea", "改")

    server.gate.open.set()
    page.wait("!runs.size")

    assert page.run("document.querySelector('.edit textarea').value") == "改"
    click(page, ".chat:nth-child(1) .name")
    assert len(page.run(TEXTS)[1]) > 10


# ---- what is kept

def test_what_has_come_of_an_answer_is_kept_when_the_page_is_closed(page, server, shut):
    say(page, "你好", wait=LIVE)
    texts = page.run(TEXTS)

    open_page(page, server)

    assert page.run(TEXTS) == texts and texts[1]


@pytest.mark.parametrize("kept", ["{", "null", "[]", '{"chats": []}'])
def test_a_page_opens_whatever_was_kept(page, server, kept):
    page.run(f"window.onpagehide = null, localStorage.setItem('mini-llm', {json.dumps(kept)})")

    open_page(page, server)

    assert (page.run(NAMES), page.run(TEXTS)) == (["New"], [])


def test_a_full_storage_is_said_until_there_is_room(page):
    page.run("window.room = Storage.prototype.setItem, Storage.prototype.setItem = () => "
             "{ throw new DOMException('', 'QuotaExceededError'); }, 0")
    say(page, "你好")
    assert page.run(HINT) == "The browser's storage is full: nothing more is kept."
    assert page.run(TEXTS)[1]

    page.run("Storage.prototype.setItem = room, 0")
    say(page, "再来")

    assert page.run(HINT).startswith("Enter sends")


def test_what_an_earlier_version_kept_is_still_there(page, server):
    """All conversations were under one name, and `current` was an index."""
    kept = {"chats": [{"messages": [{"role": "user", "content": text}], "system": "", "used": 5}
                      for text in ("三", "二", "一")], "current": 1, "lang": "zh"}
    page.run(f"localStorage.setItem('mini-llm', {json.dumps(json.dumps(kept))})")

    for _ in range(2):
        open_page(page, server)
        assert page.run(NAMES) == ["三", "二", "一"]


@pytest.mark.parametrize("accepts, language", [("zh-CN", "zh"), ("de-DE", "en")])
def test_the_language_is_first_the_browser_s(page, server, accepts, language):
    agent = page.run("navigator.userAgent")
    page.order("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=accepts)
    page.run("window.onpagehide = null, localStorage.clear()")

    open_page(page, server)

    assert page.run("document.documentElement.lang") == language
    page.order("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage="en-US")


# ---- fields and buttons

def test_the_defaults_of_the_server_stand_in_the_empty_fields(page):
    """DEFAULTS of tests/support/web_server.py. The settings are shown when they are asked for."""
    fields = ["temperature", "top_k", "seed", "max_tokens"]
    shown = page.run(f"{json.dumps(fields)}.map(id => document.getElementById(id).placeholder)")

    assert shown == ["0.8", "50", "random", "24"]
    assert not page.run("document.getElementById('system').checkVisibility()")
    click(page, "#gear")
    assert page.run("document.getElementById('system').checkVisibility()")


def test_a_message_is_sent_once_and_leaves_the_field(page):
    """Not a blank one, and none during an answer."""
    for text in (" ", "\n"):
        fill(page, "#input", text)
        click(page, "#send")
    assert page.run(TEXTS) == []

    say(page, "你好")

    assert page.run("document.getElementById('input').value") == ""
    assert page.run(TEXTS)[0] == "你好" and len(page.run(TEXTS)) == 2


def test_enter_during_an_answer_keeps_what_is_typed(page, server, shut):
    say(page, "你好", wait=LIVE)

    fill(page, "#input", "然后")
    page.press("Enter", 13)

    assert page.run("document.getElementById('input').value") == "然后"
    assert page.run("[...runs.values()][0].abort.signal.aborted") is False


def test_a_question_that_is_proposed_is_sent_with_a_click(page):
    proposed = page.run("document.querySelector('#empty button').textContent")

    click(page, "#empty button")
    page.wait(DONE)

    assert page.run(TEXTS)[0] == proposed and page.run(TEXTS)[1]


def test_escape_leaves_a_message_as_it_was(page):
    begin(page, "一")
    tool(page, "Edit", 0)
    fill(page, ".edit textarea", "二")

    page.press("Escape", 27)

    assert page.run("document.querySelector('.edit')") is None and page.run(TEXTS) == ["一"]


def test_copy_takes_the_text_alone(page):
    begin(page, "一\n<二>")
    page.run("navigator.clipboard.writeText = text => { window.copied = text; }, 0")

    tool(page, "Copy", 0)

    assert page.run("copied") == "一\n<二>"
    page.wait("document.querySelector('.tools').textContent.includes('Copied')")


def test_without_a_clipboard_there_is_no_button_for_it(page):
    """As over http from another machine."""
    page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined }), 0")

    begin(page, "一")

    assert page.run("document.querySelector('.tools').textContent") == "EditRetry"


@pytest.mark.parametrize("event, sends", [
    ({"key": "Enter"}, True), ({"key": "Enter", "shiftKey": True}, False),
    ({"key": "Enter", "isComposing": True}, False), ({"key": "a"}, False),
    ({"key": "Enter", "keyCode": 229}, False)],
    ids=["Enter", "with Shift", "in an input method", "another key", "in one, in Safari"])
def test_which_key_sends(page, event, sends):
    assert page.run(f"enters(new KeyboardEvent('keydown', {json.dumps(event)}))") == sends
