"""A pytest plugin: where torch is built for GPUs, a test with a backward pass has its own process.

Such a torch refuses a backward pass in a forked child once the parent has made one, even with all
GPUs hidden. The tests of the programs fork (support/processes.py), so pytest's own process must
never make one: the tests of files that call backward are forked, too.
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


def pytest_pyfunc_call(pyfuncitem):
    knows_gpus = torch.version.cuda or torch.version.hip
    if not knows_gpus or ".backward(" not in inspect.getsource(pyfuncitem.module):
        return None                              # pytest calls it as usual
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        # threads that pytest's process has don't survive a fork
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
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
