"""The web application of serve.py: routes, limits and streams.

    app = make_app(service, limits, decoder)             # for uvicorn

GET / (the page), GET /healthz, GET /v1/models, POST /v1/chat/completions, POST /v1/completions.
Errors have OpenAI's shape: {"error": {"message", "type", "param", "code"}}. A client that goes away
frees its row before the next step.
"""
import asyncio
import base64
import contextlib
import gc
import hashlib
import hmac
import ipaddress
import os
import sys
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from minillm.batch_decoder import Busy
from minillm.openai_api import no_such_model, read_chat, read_completion
from minillm.request_fields import ApiError, to_json

WEB = os.path.join(os.path.dirname(__file__), "web")


def is_loopback(name):
    """Whether a host's name or address means this machine alone."""
    try:
        return name == "localhost" or ipaddress.ip_address(name or "").is_loopback
    except ValueError:
        return False


@dataclass
class Limits:
    """Who may ask, and how much."""
    api_key: str = ""                      # empty: anybody
    max_body: int = 1_000_000              # bytes
    body_seconds: float = 30.0             # until a body has arrived
    loopback_only: bool = True             # refuse other names of this host: anybody can make one


def make_app(service, limits, decoder):
    """decoder: a BatchDecoder, which starts and ends with the server."""
    app = Starlette(lifespan=lifespan, routes=[
        Route("/", page),
        Route("/healthz", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", partial(respond, read=read_chat), methods=["POST"]),
        Route("/v1/completions", partial(respond, read=read_completion), methods=["POST"]),
    ], exception_handlers={ApiError: show_error, HTTPException: show_http_error,
                           Exception: show_bug})
    app.state.service = service
    app.state.limits = limits
    app.state.decoder = decoder
    app.state.page = read_page()
    return app


@contextlib.asynccontextmanager
async def lifespan(app):
    decoder = app.state.decoder
    loop = asyncio.get_running_loop()
    # seconds that the decoder may wait for this thread when it comes back from the GPU; with the
    # usual 0.005 64 clients get 7% fewer tokens/s (H200, `python -m bench.serve --compile=True`)
    sys.setswitchinterval(5e-5)
    # what exists by now stays; looking through all of it for garbage would take 0.1 s each time
    gc.freeze()
    decoder.start(lambda answers: loop.call_soon_threadsafe(wake, answers))
    try:
        yield
    finally:
        # the thread may be waiting for a callback in this loop
        await asyncio.to_thread(decoder.close)


def wake(answers):
    for answer in answers:
        answer.news.set()


# ---- what goes out

class Json(Response):
    media_type = "application/json"

    def render(self, content):
        return to_json(content)


async def show_error(request, error):
    return Json(error.body, error.status, error.headers)


async def show_http_error(request, error):
    path, message = request.url.path, error.detail
    if error.status_code == 404:
        message = f"there is no {path} here"
    if error.status_code == 405:
        message = f"{path} does not take {request.method}"
    return await show_error(request, ApiError(error.status_code, message, headers=error.headers))


BUG = ApiError(500, "the server made a mistake; its log says more", type="server_error")
STOPPED = ApiError(503, "the server was stopped before the answer was complete",
                   type="server_error")


async def show_bug(request, error):
    return await show_error(request, BUG)


def read_page():
    """The page as one file, and a policy by which a browser runs nothing but its own script."""
    text = read_file("chat.html")
    policy = ("default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
              "form-action 'none'; frame-ancestors 'none'")
    for tag, name in (("style", "chat.css"), ("script", "chat.js")):
        content = read_file(name)
        text = text.replace(f"<{tag}></{tag}>", f"<{tag}>{content}</{tag}>")
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff",
               "referrer-policy": "no-referrer", "cache-control": "no-cache"}
    return text, headers


def read_file(name):
    with open(os.path.join(WEB, name), encoding="utf-8") as file:
        return file.read()


async def page(request):
    text, headers = request.app.state.page
    return Response(text, headers=headers, media_type="text/html")


async def health(request):
    decoder = request.app.state.decoder
    status, code = "ok", 200
    if not decoder.thread.is_alive():
        status, code = "the decoder has died", 503
    return Json({"status": status, "active": decoder.active, "waiting": len(decoder.waiting)}, code)


async def models(request):
    check_caller(request)
    return Json({"object": "list", "data": [request.app.state.service.card()]})


async def one_model(request):
    check_caller(request)
    service, name = request.app.state.service, request.path_params["name"]
    if name != service.name:
        raise no_such_model(name, service)
    return Json(service.card())


# ---- what comes in

def check_caller(request):
    """Raise ApiError unless this caller may ask."""
    limits = request.app.state.limits
    if limits.api_key:
        check_key(request.headers.get("authorization", ""), limits.api_key)
    elif limits.loopback_only:
        check_host(request.headers.get("host", ""))


def check_key(authorization, key):
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer":
        given = authorization                    # the key alone
    given = given.strip()
    # a header's bytes arrive as latin-1
    if not hmac.compare_digest(given.encode("latin-1"), key.encode()):
        raise ApiError(401, "the API key is missing or wrong: send `Authorization: Bearer KEY`",
                       type="authentication_error", code="invalid_api_key")


def check_host(host):
    try:
        name = urlsplit("//" + host).hostname
    except ValueError:                           # half of an IPv6 address
        name = None
    if not is_loopback(name):
        raise ApiError(403, "this server answers to 127.0.0.1 and localhost only; "
                            "start it with --api_key or --host to let others in",
                       code="host_not_allowed")


async def read_body(request, limits):
    """The bytes of the body. Raises ApiError: too many, too slow, or not said to be JSON."""
    # any web site may have a visitor's browser send a form, but not JSON
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON, with `Content-Type: application/json`")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                size += len(piece)
                if size <= limits.max_body:
                    body += piece
                elif size > 16 * limits.max_body:
                    break                        # after this much, most clients receive the answer
    except TimeoutError:
        raise ApiError(408, f"no whole body within {limits.body_seconds:g} s") from None
    except ClientDisconnect:                     # nobody reads this answer
        raise ApiError(400, "the client left before its body had arrived") from None
    if size > limits.max_body:
        raise ApiError(413, f"the body is larger than {limits.max_body:,} bytes",
                       code="request_too_large")
    return bytes(body)


async def respond(request, read):
    """Read a request, queue its answers, and return the response that waits for them."""
    state = request.app.state
    check_caller(request)
    try:
        state.decoder.check_room()               # before a body is read for nothing
        body = await read_body(request, state.limits)
        job = await asyncio.to_thread(read, body, state.service)
        news = asyncio.Event()
        for answer in job.answers:
            answer.news = news
        state.decoder.submit(job.answers)
    except Busy as busy:
        raise ApiError(429, str(busy), code="model_busy", type="rate_limit_error",
                       headers={"retry-after": str(busy.retry_after)}) from None
    except asyncio.CancelledError:               # by uvicorn: it has waited for drain_seconds
        raise STOPPED from None
    return AnswerResponse(job, news, state.decoder)


class AnswerResponse:
    """Sends the answers of a job, as they come or at the end; stops them when the client goes."""

    def __init__(self, job, news, decoder):
        self.job, self.news, self.decoder = job, news, decoder
        self.stopped = False

    async def __call__(self, scope, receive, send):
        send_all = self.send_stream if self.job.stream else self.send_whole
        sending = asyncio.create_task(send_all(scope, receive, send))
        watching = asyncio.create_task(client_leaves(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()                 # raises what went wrong
        except asyncio.CancelledError:           # by uvicorn: it has waited for drain_seconds
            self.stopped = True
            self.news.set()
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for answer in self.job.answers:
                self.decoder.cancel(answer)
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)

    async def send_whole(self, scope, receive, send):
        answers = self.job.answers
        while not self.stopped and not all(answer.finish for answer in answers):
            await self.news.wait()
            self.news.clear()
        if self.stopped:
            response = Json(STOPPED.body, STOPPED.status)
        elif any(answer.finish == "error" for answer in answers):
            response = Json(BUG.body, BUG.status)
        else:
            response = Json(self.job.whole())
        await response(scope, receive, send)

    async def send_stream(self, scope, receive, send):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self.events():
            event = b"data: " + data + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def events(self):
        """The data of each event."""
        job = self.job
        if job.kind == "chat":
            for index in range(len(job.answers)):
                yield to_json(job.first_chunk(index))
        open_answers = dict(enumerate(job.answers))
        while open_answers:
            await self.news.wait()
            self.news.clear()
            if self.stopped:
                yield to_json(STOPPED.body)
                return
            for index, answer in list(open_answers.items()):
                finish = answer.finish           # before the text: the end brings a last piece
                text = answer.take()
                if text:
                    yield to_json(job.chunk(index, text))
                if finish == "error":
                    yield to_json(BUG.body)
                    return
                if finish:
                    yield to_json(job.last_chunk(index))
                    del open_answers[index]
        if job.include_usage:
            yield to_json(job.usage_chunk())
        yield b"[DONE]"


async def client_leaves(receive):
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
