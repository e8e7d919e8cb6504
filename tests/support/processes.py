"""A program's main() in a forked process: started, killed, waited for; what it printed.

A forked child has all modules loaded, so a tiny run takes hundredths of a second.
"""
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback

import torch

from minillm import errors
from support import ROOT

LIMIT = 600                                      # seconds; only a process that hangs takes so long


def prefix(program):
    """What its errors begin with: "train.py: ", or "bench.train: " of a module in a package."""
    folder, _, name = program.rpartition(".")
    if folder and os.path.exists(os.path.join(ROOT, folder, "__init__.py")):
        return f"{program}: "
    return f"{name}.py: "


class Fork:
    """`program`'s main() in a forked child.

    before: called first in the child, to plant a fault. env: changes of the environment.
    `wait()` returns the exit status, negative for a signal. `.out`, `.err` and `.output` (both)
    are what it has printed.
    """

    def __init__(self, program, argv, before=None, env=None, folder=None, stdin=b""):
        self.status = None
        self._streams = [tempfile.TemporaryFile(buffering=0) for _ in range(3)]
        self._streams[0].write(stdin)
        self._streams[0].seek(0)
        main = importlib.import_module(program).main
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(main, program, list(map(str, argv)), before, env or {}, folder)

    def _child(self, main, program, argv, before, env, folder):
        status = 70
        try:
            for number, stream in enumerate(self._streams):
                os.dup2(stream.fileno(), number)
            sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w", errors="backslashreplace")
            if folder is not None:
                os.chdir(folder)
            sys.argv = [os.path.join(ROOT, *program.split(".")) + ".py", *argv]
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            # threads that this process has don't survive a fork
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            torch.set_num_threads(1)
            os.environ.update(env)
            self.prepare()
            if before:
                before()
            errors.run(main)
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def prepare(self):
        """What a kind of process does in the child before anything else."""

    def poll(self):
        """The exit status if it has ended, else None."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, timeout=LIMIT):
        """Returns the exit status at its end. Fails and kills it after `timeout` seconds."""
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                self.kill()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"did not end within {timeout} s:\n{self.output}")
            time.sleep(0.001)
        return self.status

    def wait_until(self, condition):
        """Returns once condition() holds. Fails if the process ends before."""
        limit = time.monotonic() + LIMIT
        while not condition():
            assert self.poll() is None, f"ended with {self.status} before that:\n{self.output}"
            assert time.monotonic() < limit, f"not within {LIMIT} s:\n{self.output}"
            time.sleep(0.001)

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def _printed(self, number):
        stream = self._streams[number].fileno()
        return os.pread(stream, os.fstat(stream).st_size, 0).decode(errors="replace")

    @property
    def out(self):
        return self._printed(1)

    @property
    def err(self):
        return self._printed(2)

    @property
    def output(self):
        return self.out + self.err


def stat_fields(path):
    """What the stat file of a process or thread says after its name: state, parent, group, …"""
    with open(path) as file:
        return file.read().rsplit(")", 1)[1].split()


def wait_until(condition):
    """Returns once condition() holds."""
    limit = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < limit, f"not within {LIMIT} s"
        time.sleep(0.01)


def run(program, argv, **options):
    """The process, which has ended."""
    child = Fork(program, argv, **options)
    child.wait()
    return child


def finish(program, argv, **options):
    """Run to the end; returns what it printed. Fails unless it exits 0."""
    child = run(program, argv, **options)
    assert child.status == 0, f"exit {child.status}\n{child.output}"
    return child.output


def refused(program, argv, **options):
    """Returns the line of the refusal, its last. Fails unless it exits 2 without a traceback."""
    child = run(program, argv, **options)
    assert child.status == 2, f"exit {child.status}\n{child.output}"
    assert "Traceback" not in child.output, child.output
    lines = [line for line in child.err.splitlines() if line.startswith(prefix(program))]
    assert len(lines) == 1 and child.err.endswith(lines[0] + "\n"), child.err
    return lines[0]
