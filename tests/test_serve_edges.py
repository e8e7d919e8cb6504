"""serve.py at the edges: keys, full queues, a fault in one of several answers, the last piece."""
import asyncio
import socket
import threading
from types import SimpleNamespace

import pytest

from minillm.generation import decode_one_token
from support.tiny_models import tiny_model
from support.web_server import CHAT, HELLO, PATIENCE, alone, chat, httpx, served, server

from minillm.http_app import AnswerResponse          # behind support.web_server: it needs starlette


@pytest.mark.parametrize("method, path", [
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", CHAT), ("POST", "/v1/completions")])
def test_every_path_of_the_api_asks_for_the_key(method, path):
    body = {"messages": HELLO} if path == CHAT else {}
    with served(tiny_model(), api_key="key") as server:
        def status(**headers):
            return httpx.request(method, server.url + path, headers=headers, timeout=PATIENCE,
                                 json=body if method == "POST" else None).status_code

        assert status() == status(authorization="Bearer other") == 401
        for right in ("Bearer key", "bearer key", "BEARER  key", "key"):
            assert status(authorization=right) == 200


def test_who_finds_the_queue_full_need_not_send_a_body():
    with served(tiny_model(), rows=1, max_waiting=-1, body_seconds=0.1) as server:
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection(address, PATIENCE) as client:
            client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                           "application/json\r\nContent-Length: 100\r\n\r\n{".encode())

            answer = client.recv(1000)

    assert answer.startswith(b"HTTP/1.1 429 ")


def test_choices_that_are_made_one_after_the_other():
    """There is one row: the response waits for the last of them."""
    with served(tiny_model(), rows=1) as server:
        choices = chat(server, n=3, seed=5).choices

        texts = [choice.message.content for choice in choices]
        assert [choice.seed for choice in choices] == [5, 6, 7]
        assert texts == [alone(server, seed=seed) for seed in (5, 6, 7)]


def test_a_response_is_a_fault_if_one_of_its_choices_is(capfd):
    faults = [RuntimeError("out of luck")]

    def decode(*arguments):
        if faults:
            raise faults.pop()
        return decode_one_token(*arguments)
    with served(tiny_model(), rows=1) as server:
        server.decoder.decode = decode

        assert server.ask(CHAT, {"messages": HELLO, "n": 2}).status_code == 500
        assert server.ask(CHAT, {"messages": HELLO, "n": 2}).status_code == 200
    assert "out of luck" in capfd.readouterr().err


def test_health_says_that_the_decoder_has_died(server, monkeypatch):
    def health():
        response = httpx.get(server.url + "/healthz", timeout=PATIENCE)
        return response.status_code, response.json()["status"]
    assert health() == (200, "ok")

    monkeypatch.setattr(server.decoder, "thread", threading.Thread())

    assert health() == (503, "the decoder has died")


def test_the_page_is_asked_for_again_and_runs_its_own_script_alone(server):
    """A browser that kept it would show an old one after an update."""
    headers = httpx.get(server.url + "/", timeout=PATIENCE).headers

    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert sum(rule.startswith("script-src 'sha256-") for rule in policy) == 1


class Ending:
    """An Answer that ends, with its last piece, while a reader takes the piece before."""

    def __init__(self):
        self.finish, self.pieces = None, ["a", "b"]

    def take(self):
        piece = self.pieces.pop(0)
        self.finish = "stop"
        return piece


def test_the_last_piece_of_a_stream_is_never_lost():
    job = SimpleNamespace(kind="text", answers=[Ending()], chunk=lambda index, text: text,
                          last_chunk=lambda index: "end", include_usage=False)

    async def read():
        news = SimpleNamespace(wait=lambda: asyncio.sleep(0), clear=lambda: None)
        return [data async for data in AnswerResponse(job, news, None).events()]

    assert asyncio.run(read()) == [b'"a"', b'"b"', b'"end"', b"[DONE]"]
