"""Encoders for encode_ahead() in the tests.

A worker process imports this file to unpickle them, so it imports nothing that takes long.
"""
import os
import signal

from minillm.errors import UserError


class Doubles:
    def __call__(self, block):
        return block * 2


class FailsAtSeven:
    def __call__(self, block):
        if block == 7:
            raise UserError("block 7 is bad")
        return block


class Dies:
    def __call__(self, block):
        os.kill(os.getpid(), signal.SIGKILL)
