"""serve.py's application on a free port, in threads of the test process, with a model of the test's choice."""
import contextlib
import socket
import threading

import httpx
import openai
import uvicorn

from minillm.batch_decoder import BatchDecoder
from minillm.http_app import Limits, make_app
from minillm.openai_api import Service
from model import decode_one_token, prefill

DEFAULTS = {"max_new_tokens": 24, "temperature": 0.8, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
PATIENCE = 60                    # seconds that an event may take on a machine that is busy


class Gate:
    """decode_one_token, which waits while the gate is shut: a test may look at a server in the middle of its work."""

    def __init__(self):
        self.open = threading.Event()
        self.open.set()

    def __call__(self, *arguments):
        assert self.open.wait(PATIENCE)
        return decode_one_token(*arguments)


class Server:
    """url, model, decoder, gate; ask(path, body) posts JSON or bytes."""

    def __init__(self, model, url, gate, key):
        self.model, self.url, self.gate, self.key = model, url, gate, key
        self.decoder = None
        self.step = threading.Condition()

    def client(self, **options):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=self.key or "none", max_retries=0, timeout=PATIENCE, **options)

    def ask(self, path, body, **headers):
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url + path, headers=headers, timeout=PATIENCE, **content)

    def wait(self, condition):
        """Until condition() holds; it is looked at after each step."""
        with self.step:
            # a row is freed after the step's news, so look again now and then
            for _ in range(PATIENCE * 20):
                if condition():
                    return
                self.step.wait(0.05)
        raise AssertionError("waited in vain")

    def idle(self):
        return self.decoder.active == 0 and not self.decoder.waiting


@contextlib.contextmanager
def served(model, rows=4, max_waiting=64, defaults=DEFAULTS, most_tokens=4096, **limits):
    """A Server, running; it is shut down at the end."""
    gate = Gate()
    bound = socket.create_server(("127.0.0.1", 0))
    server = Server(model, f"http://127.0.0.1:{bound.getsockname()[1]}", gate, limits.get("api_key"))
    cache = model.new_cache(rows)

    def start_decoder(notify):
        def notify_and_tell(answers):
            notify(answers)
            with server.step:
                server.step.notify_all()
        server.decoder = BatchDecoder(model, cache, prefill, gate, max_waiting, notify_and_tell)
        return server.decoder
    app = make_app(Service(model, cache, "tiny", defaults, most_tokens), Limits(**limits), start_decoder)
    web = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
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
