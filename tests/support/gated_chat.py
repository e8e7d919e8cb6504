"""chat.py with a gate: while a file `shut` lies in the folder, an answer stops after ten tokens.

    python tests/support/gated_chat.py --out_dir=tiny

A test shuts the gate to look at the program in the middle of an answer. Ctrl-C opens it as well.
While a file `pasting` lies there, more lines may follow, however slowly they come.
"""
import os
import signal
import time

import chat
from minillm import terminal
from minillm.errors import run
from model import GPT

generate, waiting = GPT.generate, terminal.waiting
signals, note = os.pipe2(os.O_NONBLOCK)          # Python writes a byte for each signal it handles


def signalled():
    """Whether a signal has come since the last call."""
    try:
        return os.read(signals, 100) != b""
    except BlockingIOError:
        return False


def gated(self, *args, **options):
    signalled()
    for n, token in enumerate(generate(self, *args, **options), 1):
        yield token
        while n >= 10 and os.path.exists("shut") and not signalled():
            time.sleep(0.001)


def patient(seconds):
    while not (found := waiting(seconds)) and seconds and os.path.exists("pasting"):
        pass
    return found


if __name__ == "__main__":
    GPT.generate, terminal.waiting = gated, patient
    signal.set_wakeup_fd(note)
    run(chat.main)
