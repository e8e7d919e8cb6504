"""A stock llama.cpp with a GGUF loaded, as a server in a process of its own.

    with LlamaCpp("model.gguf") as server:
        ids = server.tokenize("你好")
        output = server.post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": 5})

It is the wheel xllamacpp. In this process its threads would meet the forks of other tests.
"""
import json
import subprocess
import sys
import tempfile
import urllib.request

import pytest

from support.processes import LIMIT

SERVER = """
import os, sys, xllamacpp
# stdout is for the address alone: a pipe that nobody reads would fill with the log and block
address = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.cpuparams.n_threads = sys.argv[1], int(sys.argv[2]), 1, 1
p.warmup = p.fit_params = False
# all of it in float32: flash attention on a CPU rounds to 16 bits
p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(p)
print(server.listening_address, file=address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    def __init__(self, path, context=512):
        pytest.importorskip("xllamacpp")
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path), str(context)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            self.log.seek(0)
            raise AssertionError("llama.cpp did not start:\n" + self.log.read()[-2000:].decode())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def post(self, path, body):
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return json.load(opener.open(request, timeout=LIMIT))

    def tokenize(self, text):
        return self.post("/tokenize", {"content": text, "parse_special": False})["tokens"]

    def log_probabilities(self, ids, vocab_size):
        """{id: natural log of its probability} after the prompt `ids`."""
        # the server is silent about a token that is half a character, so it draws a whole one;
        # what it reports is the probability before the bias
        whole = self.tokenize("a")
        output = self.complete(ids, 1, vocab_size, logit_bias=[[whole[0], 1000]])
        tops = output["completion_probabilities"][0]["top_logprobs"]
        return {top["id"]: top["logprob"] for top in tops}

    def greedy(self, ids, count):
        """The `count` most likely ids that follow `ids`, one after the other."""
        return self.complete(ids, count, 1)["tokens"]

    def complete(self, ids, count, n_probs, **options):
        return self.post("/completion", {
            "prompt": ids, "n_predict": count, "n_probs": n_probs, "temperature": 0, "top_k": 1,
            "cache_prompt": False, "return_tokens": True} | options)
