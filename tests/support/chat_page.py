"""serve.py's page in a headless Chromium, and the hands of somebody who uses it.

    from support.chat_page import browser, page, say, server     # three fixtures and a function

A test file that imports this is skipped where there is no Chromium.
"""
import json

import pytest

from support.browser import Browser, find_chromium
from support.tiny_models import talkative, tiny_model
from support.web_server import served

if not find_chromium():
    pytest.skip("chromium is not installed", allow_module_level=True)

DONE = "!runs.size && chat().messages.length && !document.querySelector('.live')"
LIVE = "document.querySelector('.live .text')?.textContent"
TEXTS = "[...document.querySelectorAll('.message .text')].map(text => text.textContent)"
NAMES = "[...document.querySelectorAll('.chat .name')].map(name => name.textContent)"
USED = "document.getElementById('used').textContent"
ERROR = "document.querySelector('.error')?.textContent"


@pytest.fixture(scope="module")
def server():
    with served(talkative(tiny_model(block_size=128)), rows=2) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    """The page as somebody sees it who has never been there."""
    browser.open(server.url + "/healthz")
    browser.run("localStorage.clear()")
    browser.resize(1100, 720)
    open_page(browser, server)
    browser.errors.clear()
    yield browser
    assert browser.errors == []


def open_page(browser, server):
    """Load it anew."""
    browser.open("about:blank")
    browser.open(server.url + "/")
    browser.wait(USED)


def click(page, selector):
    page.run(f"document.querySelector({json.dumps(selector)}).click()")


def fill(page, selector, text):
    page.run(f"document.querySelector({json.dumps(selector)}).select()")
    page.type(text)


def say(page, text, wait=DONE):
    fill(page, "#input", text)
    page.press("Enter", 13)
    page.wait(wait)


def tool(page, word, message):
    """Click the button `word` under message number `message`."""
    buttons = f"[...document.querySelectorAll('.message')[{message}].querySelectorAll('button')]"
    page.run(f"{buttons}.find(button => button.textContent === '{word}').click()")
