"""The repository root is the import path, as it is for a user's `python train.py`.

And what every test may rely on.
"""
import os
import signal
import sys
import threading

import pytest
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
pytest_plugins = ["support.own_process", "support.small_corpus", "support.small_project"]
# Two threads that wait for one another on busy cores are ten times as slow as one
os.environ["OMP_NUM_THREADS"] = "1"
# Tests fork. A pool of compiler processes, once this one has it, is broken in its children, and
# they wait for it forever
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# What a shell starts in the background ignores Ctrl-C, and hands that on to the programs that the
# tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
# tqdm's lock is one for all forked processes: a child killed while it writes would hold it for ever
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Token files to train on, with their tokenizer. Tests leave them as they are."""
    # late: it imports train.py, which most of the tests don't need
    from support.training_runs import make_data
    return make_data(tmp_path_factory.mktemp("training") / "data")
