"""Speed of serve.py: tokens/s and the time to the first token, for 1, 8 and 64 clients at once.

    python -m bench.serve                              # the 171M model with random weights
    python -m bench.serve --n_expert=8                 # the 876M MoE
    python -m bench.serve --out_dir=out/sft            # a trained one
    python -m bench.serve --url=http://127.0.0.1:8000  # a server that runs already

Each client streams answers one after the other, each to a prompt of its own. The clients live in a
process apart from the server. tokens/s counts all tokens made from the first request to the last
answer's end, so it holds the prompts' reading and the ramp at both ends; the times to the first
token are the median and the longest.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import tokenizers
import uvicorn
from tokenizers import models, pre_tokenizers

from bench.measure import ModelShape, make_model, print_headline
from minillm import tokenizer
from minillm.batch_decoder import BatchDecoder
from minillm.configurator import NonNegative, Positive, configure
from minillm.device import pick_device, pick_dtype
from minillm.errors import UserError, run
from minillm.http_app import Limits, make_app
from minillm.openai_api import Service
from minillm.sampling_params import SamplingParams
from model import GPT, fast_versions

CLIENTS = (1, 8, 64)


@dataclass
class Settings(ModelShape):
    # the server
    out_dir: str = ""                 # folder of a trained model; empty: random weights
    url: str = ""                     # a server that runs already
    rows: NonNegative = 0             # answers at the same time; 0: 8 on a CPU, 64 on a GPU
    block_size: Positive = 512        # the context, with random weights
    device: str = "auto"              # auto, cpu, cuda
    dtype: str = "auto"               # auto, float32, bfloat16
    compile: bool = False             # Triton kernels, on a GPU
    # the clients
    clients: NonNegative = 0          # so many only; 0: 1, 8 and 64 in turn
    requests: Positive = 2            # of each client
    prompt: Positive = 32             # characters of a prompt
    new_tokens: NonNegative = 0       # most tokens of an answer; 0: 256, or 64 on a CPU


def main():
    s = configure(Settings)
    if s.url:
        for clients in (s.clients,) if s.clients else CLIENTS:
            asyncio.run(measure(s, clients))
    else:
        serve_and_measure(s)


def serve_and_measure(s):
    """Start a server in this process and the clients in another."""
    device = pick_device(s.device)
    if s.out_dir:
        model = GPT.from_checkpoint(s.out_dir, device=device, dtype=s.dtype)
    else:
        model = make_model(s, s.block_size, device)
        model.for_generation(device, pick_dtype(s.dtype, device))
        model.tokenizer = make_tokenizer(s.vocab_size)
    on_gpu = device.type == "cuda"
    rows = s.rows or (64 if on_gpu else 8)
    new_tokens = s.new_tokens or (256 if on_gpu else 64)
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    print_headline(model, device, dtype, f"{rows} rows", f"answers of {new_tokens} tokens")

    cache = model.new_cache(rows)
    service = Service(model, cache, "bench", SamplingParams(temperature=0.8, top_k=50), 10**6)
    fast = fast_versions.for_batch_decoder(model, rows, s.compile) if fast_versions else {}
    decoder = BatchDecoder(model, cache, 10**4, **fast)
    if on_gpu:
        decoder.warm_up(service.defaults)
    app = make_app(service, Limits(), decoder)
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        subprocess.run([sys.executable, "-m", "bench.serve", f"--url={url}",
                        f"--clients={s.clients}", f"--requests={s.requests}",
                        f"--prompt={s.prompt}", f"--new_tokens={new_tokens}"], check=True)
    finally:
        server.should_exit = True
        thread.join()


def make_tokenizer(vocab_size):
    """Bytes and pairs of bytes, as many as the vocabulary asks for: for models without text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = tokenizer.SPECIAL_TOKENS + alphabet
    room = vocab_size - len(tokens)
    if room < 0:
        raise UserError(f"vocab_size={vocab_size} must be at least {len(tokens)}")
    merges = [(a, b) for a in alphabet for b in alphabet][:room]
    tokens += [a + b for a, b in merges]
    backend = tokenizer.untrained()
    backend.model = models.BPE({token: id for id, token in enumerate(tokens)}, merges)
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True)
                                for token in tokenizer.SPECIAL_TOKENS])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(backend, folder)
        return tokenizer.Tokenizer.load(folder)


async def measure(s, clients):
    """Print one line for `clients` at once."""
    await ask(s, "warm up", 2)
    draw = random.Random(clients)

    async def client():
        results = []
        for _ in range(s.requests):
            text = "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(s.prompt))
            results.append(await ask(s, text, s.new_tokens or 256))
        return results

    start = time.perf_counter()
    per_client = await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    firsts = [first for results in per_client for first, _ in results]
    tokens = sum(tokens for results in per_client for _, tokens in results)
    speed = tokens / seconds
    median, longest = 1e3 * statistics.median(firsts), 1e3 * max(firsts)
    print(f"{clients:4} clients  {speed:8.1f} tokens/s  {speed / clients:7.1f} each  "
          f"first token after {median:.0f} ms, {longest:.0f} ms at most", flush=True)


async def ask(s, text, new_tokens):
    """(seconds to the first text, tokens made) of one streamed answer."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": new_tokens,
                       "stream": True, "stream_options": {"include_usage": True}})
    address = urlsplit(s.url)
    key = os.environ.get("MINILLM_API_KEY", "")
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Authorization: Bearer {key}\r\nConnection: close\r\n\r\n")
    start = time.perf_counter()
    first = usage = None
    reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
    try:
        writer.write((head + body).encode())
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            if first is None and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
    finally:
        writer.close()
    if usage is None:
        raise UserError(f"{s.url} broke the answer off")
    if first is None:                 # an answer without a whole character
        first = time.perf_counter() - start
    return first, usage["completion_tokens"]


if __name__ == "__main__":
    run(main)
