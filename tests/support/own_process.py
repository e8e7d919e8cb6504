"""A pytest plugin: tests see no GPU, but those marked `gpu`, each in a process of its own.

The tests of the programs fork (support/processes.py), and a process that has used a GPU can no
longer be forked. So pytest's own process hides all GPUs from itself and from its children; where
there are some, a test marked `gpu` is called in a child that sees them, elsewhere it is skipped.

A torch that is built for GPUs also refuses a backward pass in a forked child once the parent has
made one, even with all GPUs hidden: with such a torch the tests of files that call backward have
their own process, too.
"""
import inspect
import json
import os
import sys
import traceback

import pytest
import torch

# asked by NVML: to ask CUDA would make it unusable in a forked child
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# a worker of pytest-xdist inherits both: GPUS is what the first process saw
GPUS = os.environ.setdefault("GPUS_FOR_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
    map(str, range(torch.cuda.device_count()))))
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_pyfunc_call(pyfuncitem):
    knows_gpus = torch.version.cuda or torch.version.hip
    on_gpu = pyfuncitem.get_closest_marker("gpu")
    if on_gpu and not GPUS:
        pytest.skip("needs a GPU")
    if not on_gpu and not (knows_gpus and ".backward(" in inspect.getsource(pyfuncitem.module)):
        return None                              # pytest calls it as usual
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        # threads that pytest's process has don't survive a fork
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        if on_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = GPUS
        with open(writer, "w") as pipe:
            json.dump(outcome(pyfuncitem), pipe)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    kind, text = json.loads(told) if told else ("failed", f"its process ended with {status}")
    if kind == "skipped":
        pytest.skip(text)
    if kind == "failed":
        pytest.fail(text, pytrace=False)
    return True


def outcome(pyfuncitem):
    """("passed", "skipped" or "failed", why) of the test, called here."""
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    try:
        pyfuncitem.obj(**arguments)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except BaseException:
        return "failed", traceback.format_exc()
    return "passed", ""
