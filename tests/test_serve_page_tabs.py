"""serve.py's page in two tabs: neither loses what the other one keeps."""
import contextlib
import json

import pytest

from support.chat_page import (DONE, LIVE, NAMES, TEXTS, browser, click, fill, open_page, page,
                               say, server, tool)


@pytest.fixture
def other_tab(page, server):
    """with other_tab(): what is done there is done in another tab."""
    first, second = page.session, page.new_tab()

    def use(session):
        page.session = session
        page.order("Page.bringToFront")          # a tab behind another one gets no keys

    @contextlib.contextmanager
    def other_tab():
        use(second)
        yield
        use(first)
    with other_tab():
        open_page(page, server)
    yield other_tab
    page.session = second
    page.open("about:blank")
    use(first)


@pytest.fixture
def gate(server):
    """The model makes no token after clear(), until set() or the end of the test."""
    yield server.gate.open
    server.gate.open.set()
    server.wait(server.idle)


def listed(page, *names):
    """Wait for this list of conversations, in whatever order."""
    page.wait(f"{NAMES}.sort().join() === {json.dumps(','.join(sorted(names)))}")


def test_two_tabs_keep_each_other_s_conversations(page, other_tab, server):
    with other_tab():
        say(page, "那边")
    say(page, "这边")

    listed(page, "这边", "那边")
    assert page.run(TEXTS)[0] == "这边"
    with other_tab():
        listed(page, "这边", "那边")
        assert page.run(TEXTS)[0] == "那边"
    open_page(page, server)
    listed(page, "这边", "那边")
    click(page, ".chat:not(.here) .name")
    assert page.run(TEXTS)[0] == "那边" and len(page.run(TEXTS)) == 2


def test_an_open_conversation_follows_the_other_tab(page, other_tab):
    say(page, "一")
    with other_tab():
        listed(page, "一", "New")
        click(page, ".chat:not(.here) .name")
        say(page, "二")
        texts = page.run(TEXTS)

    page.wait(f"{TEXTS}.join() === {json.dumps(','.join(texts))}")

    assert len(texts) == 4 and texts[2] == "二"


def test_both_are_kept_where_two_tabs_ask_in_one_conversation(page, other_tab, server, gate):
    say(page, "一")
    gate.clear()
    say(page, "这边", wait="runs.size")
    with other_tab():
        listed(page, "一", "New")
        click(page, ".chat:not(.here) .name")
        page.wait("chat().messages.length === 3")
        page.run("say('那边', 2)")
    page.wait("chats.length === 2")

    gate.set()

    for tab, text in ((contextlib.nullcontext, "这边"), (other_tab, "那边")):
        with tab():
            page.wait(f"{DONE} && chats.filter(one => one.messages.length === 4).length === 2")
            assert page.run(TEXTS)[2] == text
    open_page(page, server)
    assert page.run("chats.map(one => one.messages[2].content).sort()") == ["这边", "那边"]


def test_a_conversation_that_the_other_tab_deletes_is_gone(page, other_tab, gate):
    gate.clear()
    say(page, "一", wait=LIVE)
    page.run("window.signal = [...runs.values()][0].abort.signal, 0")
    with other_tab():
        listed(page, "一", "New")
        page.run("window.confirm = () => true, 0")
        click(page, ".chat:not(.here) .drop")

    page.wait("signal.aborted && !runs.size")

    listed(page, "New")
    assert page.run("Object.keys(localStorage)") == ["mini-llm"]


def test_an_edit_outlives_what_the_other_tab_does(page, other_tab):
    say(page, "一")
    tool(page, "Edit", 0)
    fill(page, ".edit textarea", "改")
    with other_tab():
        click(page, "#new")
        say(page, "二")
        click(page, "#language")

    page.wait("state.lang === 'zh' && chats.length === 2")

    assert page.run("document.querySelector('.edit textarea').value") == "改"


def test_what_one_tab_could_not_keep_does_not_go_with_what_the_other_keeps(page, other_tab):
    page.run("window.room = Storage.prototype.setItem, Storage.prototype.setItem = () => "
             "{ throw new DOMException('', 'QuotaExceededError'); }, 0")
    say(page, "一")
    with other_tab():
        say(page, "二")
    listed(page, "一", "二")
    page.run("Storage.prototype.setItem = room, 0")

    click(page, "#language")

    with other_tab():
        listed(page, "一", "二")
