"""Serve a trained model: OpenAI's API, and a page to chat with it.

    python serve.py                                        # the demo's model at http://127.0.0.1:8000
    python serve.py --out_dir=out/sft --port=8080
    python serve.py --host=0.0.0.0 --api_key=secret        # for others too; the key may also be in MINILLM_API_KEY

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "你好"}], "seed": 1}'

Any client of OpenAI's API will do, with the base URL http://127.0.0.1:8000/v1. Besides OpenAI's fields
requests take top_k and repetition_penalty. The same seed gives the same text as chat.py. Requests are
decoded together; where all rows and the queue are taken, the answer is 429 with Retry-After. Ctrl-C or
SIGTERM lets the answers under way finish. There is no encryption and one key for all: put a proxy before it
where that matters. Needs `pip install -r requirements-serve.txt`.
"""
import os
import signal
import socket
from dataclasses import dataclass

from minillm.configurator import configure
from minillm.conversation import check_sampling
from minillm.errors import UserError, run


@dataclass
class Settings:
    out_dir: str = "out/demo_sft"          # folder with the model, as train.py leaves it
    checkpoint: str = "newest"             # which of its checkpoints: newest, or best by validation loss
    device: str = "auto"                   # auto, cpu, cuda, cuda:N
    dtype: str = "auto"                    # auto, float32, bfloat16, float16
    host: str = "127.0.0.1"                # address to listen on; 0.0.0.0: all of this machine's
    port: int = 8000                       # port to listen on; 0: any free one
    api_key: str = ""                      # what clients must send as their API key; empty: nothing
    model_name: str = ""                   # the model's name for clients; empty: the folder's
    rows: int = 0                          # answers decoded at the same time; 0: 8 on a CPU, 64 on a GPU
    max_waiting: int = 64                  # answers that may wait for a row; more are told that the model is busy
    max_body: int = 1_000_000              # bytes of a request
    max_tokens: int = 4096                 # largest max_tokens of a request
    drain_seconds: int = 30                # after SIGTERM: how long answers under way may take
    max_new_tokens: int = 256              # tokens of an answer, where the request does not say
    temperature: float = 0.8               # 0: always the likeliest token; where the request does not say
    top_k: int = 50                        # draw from the k likeliest tokens; 0: from all; where the request does not say
    top_p: float = 1.0                     # draw from the likeliest tokens that hold this probability; the same
    repetition_penalty: float = 1.0        # above 1: tokens that have occurred become less likely; the same

    def defaults(self):
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}

    def check(self):
        """Raise UserError for a setting that means nothing."""
        check_sampling(**self.defaults())
        for name, least in (("rows", 0), ("max_waiting", 0), ("max_body", 1), ("max_tokens", 1), ("drain_seconds", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port} must be from 0 to 65535")


def listen(host, port):
    """A socket bound to `host` and `port`; clients are refused until the server starts on it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; --port=0 takes any free one") from None
    return bound


def main():
    s = configure(Settings)
    s.check()
    api_key = s.api_key or os.environ.get("MINILLM_API_KEY", "")
    try:
        import uvicorn                           # optional: requirements-serve.txt
        from minillm.http_app import Limits, make_app
    except ImportError as error:
        raise UserError(f"serve.py needs {error.name}: pip install -r requirements-serve.txt") from None
    if not os.path.isdir(s.out_dir):
        raise UserError(f"no model in {s.out_dir}: `make demo`, or train.py, makes one")
    bound = listen(s.host, s.port)

    # torch is first imported here: what is wrong with the settings is said at once
    from minillm.batch_decoder import BatchDecoder
    from minillm.openai_api import Service
    from model import GPT, decode_one_token, prefill
    model = GPT.from_checkpoint(s.out_dir, device=s.device, dtype=s.dtype, which=s.checkpoint)
    rows = s.rows or (64 if model.wte.weight.is_cuda else 8)
    cache = model.new_cache(rows)
    name = s.model_name or os.path.basename(os.path.realpath(s.out_dir))
    service = Service(model, cache, name, s.defaults(), s.max_tokens)
    limits = Limits(api_key, s.max_body, loopback_only=s.host in ("127.0.0.1", "localhost", "::1"))

    def start_decoder(notify):
        return BatchDecoder(model, cache, prefill, decode_one_token, s.max_waiting, notify)
    app = make_app(service, limits, start_decoder)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=s.drain_seconds))
    # uvicorn drains, then sends itself the signal again: that is the end it should come to
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    address = f"[{s.host}]" if ":" in s.host else s.host
    print(f"{name} · {rows} answers at a time · http://{address}:{bound.getsockname()[1]}", flush=True)
    server.run(sockets=[bound])


if __name__ == "__main__":
    run(main)
