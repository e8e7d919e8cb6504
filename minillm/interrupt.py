"""Ctrl-C, SIGTERM and SIGHUP finish the step, save and end the run; a second Ctrl-C exits at once.

SIGHUP comes when the terminal is closed; a run that was started with nohup ignores it.
"""
import contextlib
import os
import signal
import time

from minillm.distributed import rank_and_world


class StopSignal:
    """`asked` becomes 1 when this process is told to stop."""

    def __init__(self):
        self.asked, self.since = 0, 0.0
        self.rank, _, world = rank_and_world()
        # a launcher passes on a Ctrl-C that the terminal has already sent to its processes
        self.grace = 1.0 if world > 1 else 0.0
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        # Windows has none
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, number, frame):
        if number == signal.SIGINT and self.asked and time.monotonic() - self.since >= self.grace:
            os._exit(128 + number)
        if self.asked:
            return
        self.asked, self.since = 1, time.monotonic()
        if self.rank > 0:
            return
        line = f"\n{signal.Signals(number).name}: finishing this step, then saving"
        if number == signal.SIGINT:
            line += "; Ctrl-C again leaves at once"
        with contextlib.suppress(OSError):
            os.write(2, line.encode() + b"\n")  # print is not safe inside a signal handler
