"""serve.py under many clients at once: right texts, a busy model, clients that leave, the end."""
import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from support import ROOT
from support.processes import wait_until
from support.tiny_models import talkative, tiny_model, write_folder
from support.web_server import (CHAT, DEFAULTS, HELLO, PATIENCE, TALK, alone, chat, httpx, openai,
                                served, server, text_of)


@pytest.fixture(scope="module")
def long_server():
    """A model that talks until its long context is full."""
    with served(talkative(tiny_model(block_size=512)), rows=2, max_waiting=1) as server:
        yield server


def test_a_busy_model_says_so(long_server):
    server = long_server
    server.wait(server.idle)
    server.gate.open.clear()
    with ThreadPoolExecutor(3) as pool:
        # two rows, one place in the queue
        under_way = [pool.submit(chat, server, seed=seed) for seed in range(3)]
        server.wait(lambda: server.decoder.active + len(server.decoder.waiting) == 3)

        with pytest.raises(openai.RateLimitError) as caught:
            chat(server)

        assert caught.value.code == "model_busy"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert "the model is busy" in str(caught.value)
        server.gate.open.set()
        texts = [text_of(answer.result()) for answer in under_way]
    assert texts == [alone(server, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("begin", [b"", b'{"messages"'])
def test_a_client_that_leaves_before_its_body_has_arrived_is_no_mistake(server, caplog, monkeypatch,
                                                                        path, begin):
    """Nothing is logged, and the next one is served."""
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    under_way = server.web.server_state.tasks
    header = (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
              "Content-Length: 100\r\n\r\n").encode()
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection(address, PATIENCE) as client:
        client.sendall(header + begin)
        wait_until(lambda: under_way)

    wait_until(lambda: not under_way)
    assert text_of(chat(server, seed=1)) == alone(server, seed=1)
    assert [record for record in caplog.records if record.name == "uvicorn.error"] == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row_and_its_place_in_the_queue(long_server, stream):
    server = long_server
    server.wait(server.idle)
    server.gate.open.clear()
    body = {"messages": HELLO, "max_tokens": 400, "stream": stream}
    with httpx.Client(timeout=PATIENCE) as client, ThreadPoolExecutor(3) as pool:
        def ask():
            with contextlib.suppress(httpx.HTTPError):
                client.post(server.url + CHAT, json=body)
        under_way = [pool.submit(ask) for _ in range(3)]
        server.wait(lambda: server.decoder.active + len(server.decoder.waiting) == 3)
        with server.decoder.changed:             # none is on its way from the queue to a row
            made = [row.answer for row in server.decoder.rows if row.answer]
            made += server.decoder.waiting

        for connection in client._transport._pool.connections:
            connection._connection._network_stream.get_extra_info("socket").shutdown(2)
        server.wait(lambda: all(answer.cancelled for answer in made))
        server.gate.open.set()
        server.wait(server.idle)
        for answer in under_way:
            answer.result()

    assert [answer.finish for answer in made] == ["cancelled"] * 3


def test_a_fault_in_a_step_fails_its_requests_and_no_others(server, monkeypatch, capfd):
    server.wait(server.idle)

    def broken(*arguments):
        raise RuntimeError("out of luck")
    monkeypatch.setattr(server.decoder, "decode", broken)
    with pytest.raises(openai.InternalServerError):
        chat(server)
    with pytest.raises(openai.APIError):
        list(chat(server, stream=True))
    monkeypatch.undo()

    assert "out of luck" in capfd.readouterr().err
    assert text_of(chat(server, seed=1)) == alone(server, seed=1)


def test_a_later_turn_reads_only_what_is_new(long_server):
    server = long_server
    server.wait(server.idle)
    first = chat(server, TALK, seed=1, max_tokens=4)
    longer = TALK + [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]

    second = chat(server, longer, seed=1, max_tokens=1)

    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def request_of(number):
    """(messages, options as model.chat takes them, stream?) of a request, drawn from its number."""
    draw = random.Random(number)
    long = [{"role": "user", "content": draw.choice("山水the") * draw.randint(1, 8)}]
    options = {"seed": number, "temperature": draw.choice([0, 0.8, 1.3]),
               "top_k": draw.choice([0, 5, 50]), "max_new_tokens": draw.randint(1, 60)}
    return draw.choice([HELLO, TALK, long]), options, draw.random() < 0.5


def ask_and_read(url, number, cut):
    """The text that comes back; None with `cut`, which leaves after the first piece of a stream."""
    messages, options, stream = request_of(number)
    body = {"messages": messages, "stream": stream or cut} | options
    body["max_tokens"] = body.pop("max_new_tokens")
    with httpx.stream("POST", url + CHAT, json=body, timeout=PATIENCE) as response:
        assert response.status_code == 200
        if cut:
            next(response.iter_raw())
            return None
        data = response.read().decode()
    if not stream:
        return json.loads(data)["choices"][0]["message"]["content"]
    chunks = [json.loads(event.removeprefix("data: ")) for event in data.split("\n\n")[:-2]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def many_requests(url, requests, clients):
    """The texts that come back; one request in ten is cut off, which gives None."""
    def one(number):
        return ask_and_read(url, number, cut=number % 10 == 9)

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, range(requests)))


def count_right(model, texts):
    """(right, wrong), by what the model says alone."""
    right = wrong = 0
    for number, text in enumerate(texts):
        if text is None:
            continue
        messages, options, _ = request_of(number)
        if text == model.chat(messages, **DEFAULTS | options):
            right += 1
        else:
            wrong += 1
    return right, wrong


@pytest.mark.parametrize("n_expert, fast", [(0, True), (4, True), (0, False)])
def test_requests_that_come_together_get_the_text_they_get_alone(n_expert, fast):
    with served(tiny_model(n_expert), rows=4, fast=fast) as server:
        texts = many_requests(server.url, 60, clients=12)

        server.wait(server.idle)
        assert all(row.answer is None for row in server.decoder.rows)
        assert count_right(server.model, texts) == (54, 0)


# ---- the program

def start(folder, *flags, **environment):
    argv = [sys.executable, "serve.py", f"--out_dir={folder}", "--port=0", "--device=cpu",
            "--dtype=float32", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(argv, cwd=ROOT, text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_thousands_of_requests_leave_nothing_behind(tmp_path):
    """3,000 requests from 32 clients. A leak of 10 kB per request would show twice over."""
    model = tiny_model()
    folder = write_folder(tmp_path / "model", model)
    program = start(folder, "--rows=8", "--max_new_tokens=24")
    try:
        url = program.stdout.readline().split()[-1]
        resident = []
        for _ in range(3):
            texts = many_requests(url, 1000, clients=32)
            assert count_right(model, texts) == (900, 0)
            with open(f"/proc/{program.pid}/statm") as file:
                resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

        assert resident[-1] - resident[0] < 10 << 20
        health = httpx.get(url + "/healthz", timeout=PATIENCE).json()
        assert (health["active"], health["waiting"]) == (0, 0)
    finally:
        program.kill()


def test_sigterm_lets_the_answers_under_way_finish(tmp_path):
    model = talkative(tiny_model(block_size=2048))
    program = start(write_folder(tmp_path / "model", model), "--rows=1",
                    f"--drain_seconds={PATIENCE}", MINILLM_API_KEY="k")
    try:
        url = program.stdout.readline().split()[-1]
        client = openai.OpenAI(base_url=url + "/v1", api_key="k", max_retries=0, timeout=PATIENCE)
        options = {"messages": HELLO, "model": "model", "temperature": 0, "max_tokens": 1500}
        # the second one waits for a row
        streams = [client.chat.completions.create(**options, stream=True) for _ in range(2)]
        pieces = [next(streams[0]).choices[0].delta.content]

        program.send_signal(signal.SIGTERM)
        pieces += [chunk.choices[0].delta.content or "" for chunk in streams[0]]
        others = [chunk.choices[0].delta.content or "" for chunk in streams[1]]

        want = model.chat(HELLO, max_new_tokens=1500, temperature=0)
        assert "".join(pieces) == want
        assert "".join(others) == want
        assert program.wait(PATIENCE) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert program.stderr.read() == ""
    finally:
        program.kill()


def begin_request(url, body, length=None):
    """A socket that has sent a request, or what of it `body` is. Returns once it is read."""
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), PATIENCE)
    head = (f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Expect: 100-continue\r\nContent-Length: {length or len(body)}\r\n\r\n")
    connection.sendall(head.encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 100")
    connection.sendall(body)
    return connection


def read_all(connection):
    with connection, connection.makefile("rb") as file:
        return file.read().decode()


def wait_until_it_stops(url):
    """Until a server that was told to end takes no more clients."""
    def refuses():
        try:
            httpx.get(url + "/healthz", timeout=PATIENCE)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:             # it was about to close
            pass
        return False
    wait_until(refuses)


def test_answers_cut_off_by_the_end_say_so(tmp_path):
    """A stream, an answer in one piece that waits for its row, and half a request."""
    model = talkative(tiny_model(block_size=2**15))
    program = start(write_folder(tmp_path / "model", model), "--rows=1", f"--max_tokens={2**15}",
                    "--drain_seconds=0")
    try:
        url = program.stdout.readline().split()[-1]
        body = {"messages": HELLO, "max_tokens": 2**15}
        stream = begin_request(url, json.dumps(body | {"stream": True}).encode())
        wait_until(lambda: httpx.get(url + "/healthz", timeout=PATIENCE).json()["active"] == 1)
        whole = begin_request(url, json.dumps(body).encode())
        half = begin_request(url, b"{", length=100)
        wait_until(lambda: httpx.get(url + "/healthz", timeout=PATIENCE).json()["waiting"] == 1)

        program.send_signal(signal.SIGTERM)
        answers = [read_all(stream), read_all(whole), read_all(half)]

        error = '{"error":{"message":"the server was stopped before the answer was complete"'
        assert all(error in answer for answer in answers)
        assert answers[0].startswith("HTTP/1.1 200 ")
        assert all(answer.startswith("HTTP/1.1 503 ") for answer in answers[1:])
        assert program.wait(PATIENCE) == 0
        assert re.fullmatch("ERROR: +Cancel 3 running task.+\n", program.stderr.read())
    finally:
        program.kill()


def test_ctrl_c_twice_ends_at_once_and_without_a_traceback(tmp_path):
    model = talkative(tiny_model(block_size=2**15))
    program = start(write_folder(tmp_path / "model", model), f"--max_tokens={2**15}",
                    f"--drain_seconds={PATIENCE}")
    try:
        url = program.stdout.readline().split()[-1]
        body = {"messages": HELLO, "max_tokens": 2**15, "stream": True}
        stream = begin_request(url, json.dumps(body).encode())
        assert stream.recv(1000).startswith(b"HTTP/1.1 200 ")

        program.send_signal(signal.SIGINT)
        wait_until_it_stops(url)
        program.send_signal(signal.SIGINT)

        assert program.wait(PATIENCE) == 130
        assert program.stderr.read() == ""
    finally:
        program.kill()


@pytest.mark.parametrize("flags, says", [
    (["--temperature=-1"], "temperature=-1.0 must be 0 or more"),
    (["--rows=-1"], "rows=-1 must be at least 0"),
    (["--port=70000"], "port=70000 must be at least 0 and at most 65,535"),
    (["--out_dir=nowhere"], "no model in nowhere"),
    (["--host=256.0.0.1"], "cannot listen on 256.0.0.1:0: "),
], ids=lambda value: str(value)[:30])
def test_a_setting_that_is_wrong_ends_in_one_line(tmp_path, flags, says):
    program = start(tmp_path, *flags)
    output, errors = program.communicate(timeout=PATIENCE)

    assert program.returncode == 2 and output == ""
    assert errors.startswith(f"serve.py: {says}") and errors.count("\n") == 1
