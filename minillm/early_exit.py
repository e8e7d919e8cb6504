"""Imported first by a program: how it ends while it imports the rest, without a traceback.

(And what must be set before torch is imported.)

Ctrl-C: at once, exit status 130. KeyboardInterrupt would be printed, or be lost in a library;
errors.run() brings it back for main(), which may have to tidy up. A Python that is too old, or
without a package of these lists: one line, exit status 2.
"""
import os
import signal
import sys

PACKAGES = {
    "requirements.txt": ("torch", "numpy", "tokenizers", "tqdm", "filelock"),
    "requirements-serve.txt": ("starlette", "uvicorn"),
}


def _leave(reason):
    from minillm.errors import program_name      # late: only the handler below must come first
    print(f"{program_name()}: {reason}", file=sys.stderr)
    sys.exit(2)


def _name_missing_package(kind, error, trace):
    for listed_in, names in PACKAGES.items():
        if kind is ModuleNotFoundError and error.name in names:
            _leave(f"this Python has no {error.name}: activate the environment "
                   f"(`. .venv/bin/activate`), or `pip install -r {listed_in}`")
    sys.__excepthook__(kind, error, trace)


# A thread on a CPU that waits for the others looks 2,000 times and then sleeps. By default it looks
# 300,000 times, and keeps a core from the very thread that it waits for: beside other programs the
# demo trains 1.4 to 2.3 times as fast this way (two cores), and as fast as before on idle cores.
# torch's OpenMP (GNU's, on Linux) reads it when torch is imported
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

sys.excepthook = _name_missing_package
# in the background of a shell it may be ignored, and stays so
if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
if sys.version_info < (3, 11):
    _leave(f"this is Python {sys.version_info[0]}.{sys.version_info[1]}, and 3.11 or newer is "
           "needed: make .venv anew with a newer one")
