"""chat.py with a gate: while a file `shut` lies in the folder, an answer stops after ten tokens.

    python tests/support/gated_chat.py --out_dir=tiny

A test shuts the gate to look at the program in the middle of an answer.
"""
import os
import time

import chat
from minillm.errors import run
from model import GPT

generate = GPT.generate


def gated(self, *args, **options):
    for n, token in enumerate(generate(self, *args, **options), 1):
        yield token
        while n >= 10 and os.path.exists("shut"):
            time.sleep(0.001)


if __name__ == "__main__":
    GPT.generate = gated
    run(chat.main)
