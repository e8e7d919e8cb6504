"""serve.py's application on a free port, in threads of the test process, with any model.

A test file that imports this is skipped where the packages of requirements-serve.txt are missing.
"""
import contextlib
import socket
import threading

import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from minillm.batch_decoder import BatchDecoder
from minillm.generation import decode_one_token
from minillm.http_app import Limits, make_app
from minillm.openai_api import Service
from minillm.sampling_params import SamplingParams
from model import fast_versions
from support.processes import LIMIT
from support.tiny_models import tiny_model

DEFAULTS = {"max_new_tokens": 24, "temperature": 0.8, "top_k": 50}
HELLO = [{"role": "user", "content": "你好"}]
TALK = [{"role": "system", "content": "诗"}, {"role": "user", "content": "从前"},
        {"role": "assistant", "content": "山"}, {"role": "user", "content": "然后？"}]
CHAT = "/v1/chat/completions"
PATIENCE = LIMIT                                 # seconds; only a server that hangs takes so long


class Gate:
    """A decode step that waits while the gate is shut: tests then look at a server at work."""

    def __init__(self, decode):
        self.decode, self.open = decode, threading.Event()
        self.open.set()

    def __call__(self, *arguments):
        assert self.open.wait(PATIENCE)
        return self.decode(*arguments)


class TellingDecoder(BatchDecoder):
    """A BatchDecoder that tells `step`, too, that answers have news."""

    def start(self, notify):
        self.step = threading.Condition()

        def notify_and_tell(answers):
            notify(answers)
            with self.step:
                self.step.notify_all()
        super().start(notify_and_tell)


class Server:
    """url, model, decoder, gate, web (uvicorn's); ask(path, body) posts JSON or bytes."""

    def __init__(self, model, url, gate, key, decoder):
        self.model, self.url, self.gate, self.key = model, url, gate, key
        self.decoder = decoder

    def client(self, **options):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=self.key or "none", max_retries=0,
                             timeout=PATIENCE, **options)

    def ask(self, path, body, **headers):
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"content-type": "application/json"} | headers
        return httpx.post(self.url + path, headers=headers, timeout=PATIENCE, **content)

    def wait(self, condition):
        """Until condition() holds; it is looked at after each step."""
        with self.decoder.step:
            # a row is freed after the step's news, so look again now and then
            for _ in range(PATIENCE * 20):
                if condition():
                    return
                self.decoder.step.wait(0.05)
        raise AssertionError("waited in vain")

    def idle(self):
        return self.decoder.active == 0 and not self.decoder.waiting


@contextlib.contextmanager
def served(model, rows=4, max_waiting=64, fast=True, **limits):
    """A Server, running; it is shut down at the end."""
    options = fast_versions.for_batch_decoder(model, rows) if fast else {}
    gate = options["decode"] = Gate(options.get("decode", decode_one_token))
    bound = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    cache = model.new_cache(rows)
    decoder = TellingDecoder(model, cache, max_waiting, **options)
    server = Server(model, url, gate, limits.get("api_key"), decoder)
    service = Service(model, cache, "tiny", SamplingParams(**DEFAULTS), most_tokens=4096)

    limits = {"body_seconds": PATIENCE} | limits
    app = make_app(service, Limits(**limits), decoder)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    web = server.web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        httpx.get(server.url + "/healthz", timeout=PATIENCE)
        yield server
    finally:
        gate.open.set()
        web.should_exit = True
        thread.join()
        bound.close()


@pytest.fixture(scope="module")
def server():
    """A tiny model, served to all tests of a file that imports this."""
    with served(tiny_model()) as server:
        yield server


def chat(server, messages=HELLO, **options):
    """OpenAI's client asks for a chat completion."""
    extra = {key: options.pop(key) for key in ("top_k", "repetition_penalty") if key in options}
    create = server.client().chat.completions.create
    return create(model="tiny", messages=messages, extra_body=extra, **options)


def text_of(response):
    return response.choices[0].message.content


def alone(server, messages=HELLO, **options):
    """The text that the model gives by itself."""
    return server.model.chat(messages, **DEFAULTS | options)
