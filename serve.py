"""Serve a trained model: OpenAI's API, and a page to chat with it.

    python serve.py                                        # the demo's model, on port 8000
    python serve.py --out_dir=out/sft --port=8080
    python serve.py --host=0.0.0.0 --api_key=secret        # for others too

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "你好"}], "seed": 1}'

Any client of OpenAI's API works with the base URL http://127.0.0.1:8000/v1; top_k and
repetition_penalty are extra fields. A field that would change the text and is not offered, or is
misspelled, is refused. The same seed gives the same text as chat.py. Requests are decoded together;
when all rows and the queue are taken, the answer is 429 with Retry-After. SIGTERM or Ctrl-C stops
taking requests and finishes those that run. The key can also come from the environment variable
MINILLM_API_KEY. There is no encryption, and one key for all: put a proxy in front where that
matters.

Needs `pip install -r requirements-serve.txt`. Exit status: 0 after SIGTERM; 130 after Ctrl-C; 2
after a mistake that you can correct, with one line on stderr.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import errno
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass

from minillm.configurator import NonNegative, Positive, configure, whole
from minillm.errors import UserError, run
from minillm.generation_settings import check_folder
from minillm.sampling_params import DEFAULTS, SamplingParams


@dataclass
class Settings:
    # the model
    out_dir: str = "out/demo_sft"          # folder of the model, as train.py leaves it
    checkpoint: str = "newest"             # which one to load from out_dir: newest, best or a step
    device: str = "auto"                   # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"                    # auto, float32, bfloat16, float16
    compile: bool = False                  # GPU: Triton kernels, compiled before serving
    model_name: str = ""                   # its name for clients; empty: the folder's
    # who may ask, and how much
    host: str = "127.0.0.1"                # address to listen on; 0.0.0.0: all of this machine's
    port: whole(0, 65535) = 8000           # port to listen on; 0: any free one
    api_key: str = ""                      # what clients must send; empty: nothing
    rows: NonNegative = 0                  # answers at the same time; 0: 8 on a CPU, 64 on a GPU
    max_waiting: NonNegative = 64          # answers that may wait for a row
    max_body: Positive = 1_000_000         # bytes of a request
    max_tokens: Positive = 4096            # largest max_tokens of a request
    drain_seconds: NonNegative = 30        # after SIGTERM: how long answers may still take
    # used if a request does not give them
    max_new_tokens: int = DEFAULTS.max_new_tokens        # longest answer, in tokens
    temperature: float = DEFAULTS.temperature            # 0: always the likeliest token
    top_k: int = DEFAULTS.top_k            # sample from the k likeliest tokens; 0: from all
    top_p: float = DEFAULTS.top_p          # sample from the likeliest with this total probability
    repetition_penalty: float = DEFAULTS.repetition_penalty  # above 1: repeats become less likely

    def defaults(self):
        """What a request gets that says nothing. Raises UserError if it could not ask for that."""
        if "max_new_tokens" in self.given and self.max_new_tokens > self.max_tokens:
            raise UserError(f"max_new_tokens={self.max_new_tokens} is more than "
                            f"max_tokens={self.max_tokens}, the largest that a request may have")
        return SamplingParams(min(self.max_new_tokens, self.max_tokens), self.temperature,
                              self.top_k, self.top_p, self.repetition_penalty)


def bind(host, port):
    """A socket bound to `host` and `port`, which refuses clients until it listens."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except UnicodeError:
        raise UserError(f"--host={host} is no name or address of this machine") from None
    except OSError as error:
        raise cannot_listen(host, port, error) from None
    return bound


def cannot_listen(host, port, error):
    """The UserError for an OSError of a socket."""
    advice = "--host takes a name or address of this machine"
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        advice = "--port=0 takes any free port"
    return UserError(f"cannot listen on {host}:{port}: {error.strerror}; {advice}")


def read_api_key(flag):
    """The key of --api_key, or of the environment; '' where none is wanted.

    Spaces and line ends around it, which a file or a copy brings along, are no part of it.
    """
    given = flag or os.environ.get("MINILLM_API_KEY", "")
    key = given.strip()
    if given and not key:
        raise UserError("the API key is blank: give one, or leave api_key and MINILLM_API_KEY out")
    if not key.isprintable():
        raise UserError("the API key must be one line of UTF-8 text: clients send it in a header")
    return key


def warm_up(decoder, params, doing):
    """Get ready what answers need. What goes wrong ends the program here, not each request."""
    print(f"{doing}, with short answers …", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        decoder.warm_up(params)
    finally:
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def end_on_signals():
    """From now on SIGTERM and Ctrl-C end the program at once, with status 0 and 130.

    uvicorn replaces this while it serves: it lets answers finish, then sends itself the signal
    again. An exception would not do: Python drops it inside some callbacks, and a library may while
    it is imported.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))


def main():
    # 1) what can be wrong is said before torch is loaded, which takes a second
    s = configure(Settings)
    end_on_signals()
    defaults = s.defaults()
    api_key = read_api_key(s.api_key)
    check_folder(s.out_dir)
    try:
        import uvicorn                       # optional: requirements-serve.txt
        import starlette                     # noqa: F401  optional too
    except ImportError as error:
        raise UserError(f"serve.py needs {error.name}: "
                        "pip install -r requirements-serve.txt") from None
    bound = bind(s.host, s.port)

    # 2) the model, and the thread that decodes
    from minillm.batch_decoder import BatchDecoder                 # late: torch
    from minillm.before_sft import warn_before_sft                 # late: torch
    from minillm.http_app import Limits, is_loopback, make_app     # late: torch
    from minillm.openai_api import Service                         # late: torch
    from model import GPT, fast_versions                           # late: torch
    model = GPT.from_checkpoint(s.out_dir, device=s.device, dtype=s.dtype, which=s.checkpoint)
    warn_before_sft(s.out_dir)
    rows = s.rows or (64 if model.wte.weight.is_cuda else 8)
    cache = model.new_cache(rows)
    fast = {}
    if fast_versions:
        fast = fast_versions.for_batch_decoder(model, rows, s.compile)
    decoder = BatchDecoder(model, cache, s.max_waiting, **fast)
    if s.compile or model.wte.weight.is_cuda:
        warm_up(decoder, defaults,
                "--compile=True: compiling" if s.compile else "recording CUDA graphs")

    # 3) the web
    name = s.model_name or os.path.basename(os.path.realpath(s.out_dir))
    service = Service(model, cache, name, defaults, s.max_tokens)
    limits = Limits(api_key, s.max_body, loopback_only=is_loopback(bound.getsockname()[0]))
    app = make_app(service, limits, decoder)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=s.drain_seconds)
    server = uvicorn.Server(config)
    host = f"[{s.host}]" if ":" in s.host else s.host
    url = f"http://{host}:{bound.getsockname()[1]}"
    try:
        bound.listen(config.backlog)             # from now on the system lets clients wait
    except OSError as error:                     # two may bind a port, and one listen on it
        raise cannot_listen(s.host, s.port, error) from None
    print(f"{name} · {rows} answers at a time · {url}")
    server.run(sockets=[bound])
    if not server.started:
        sys.exit(3)                              # uvicorn has said why; old ones just return


if __name__ == "__main__":
    run(main)
