"""Imported first by a program: how it ends while it imports the rest, without a traceback.

Ctrl-C: at once, exit status 130. KeyboardInterrupt would be printed, or be lost in a library;
errors.run() brings it back for main(), which may have to tidy up. A package of requirements.txt
that is not there: one line, exit status 2.
"""
import os
import signal
import sys

PACKAGES = ("torch", "numpy", "tokenizers", "tqdm", "filelock")


def _name_missing_package(kind, error, trace):
    if kind is not ModuleNotFoundError or error.name not in PACKAGES:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{os.path.basename(sys.argv[0])}: this Python has no {error.name}: activate the "
          "environment (`. .venv/bin/activate`), or `pip install -r requirements.txt`",
          file=sys.stderr)
    sys.exit(2)


sys.excepthook = _name_missing_package
# in the background of a shell it may be ignored, and stays so
if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
