"""Ctrl-C while a program imports, a package that is not there, an old Python: no traceback."""
import os
import subprocess
import sys

import pytest

from support import ROOT
from support.processes import LIMIT
from support.tiny_models import tiny_model, write_folder

# modules that each imports, some of them inside main(): an early one, and slow ones
IMPORTS = {
    "train": ["minillm.errors", "torch", "model"],
    "eval": ["minillm.errors", "torch", "model"],
    "export": ["minillm.errors", "torch", "model"],
    "train_tokenizer": ["minillm.errors", "tokenizers"],
    "prepare_pretrain": ["minillm.errors", "numpy", "tokenizers"],
    "prepare_sft": ["minillm.errors", "numpy", "tokenizers"],
    "sample": ["minillm.errors", "tokenizers", "torch", "model"],
    "chat": ["minillm.errors", "tokenizers", "torch", "model"],
    "serve": ["minillm.errors", "torch", "model"],
}
# the program, which is sent a Ctrl-C when it begins to import a module: in a callback, where Python
# drops a KeyboardInterrupt, as it does in some of an import's own
CHILD = """
import os, runpy, signal, sys, weakref
script, module = sys.argv[1:3]
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            weakref.finalize(CtrlC(), os.kill, os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
sys.path.insert(0, os.path.dirname(script))
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), tiny_model())


@pytest.mark.parametrize("program, module", [
    (program, module) for program, modules in IMPORTS.items() for module in modules])
def test_ctrl_c_in_an_import_ends_the_program_quietly(model_folder, program, module):
    argv = [sys.executable, "-c", CHILD, os.path.join(ROOT, program + ".py"), module]
    if program in ("sample", "chat", "serve"):           # these import torch once they see a model
        argv += [f"--out_dir={model_folder}", "--port=0" if program == "serve" else "--prompt=x"]

    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, cwd=model_folder)

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# those that import a package before main(), as they are started and as they name themselves
STARTED = {f"{name}.py": f"{name}.py" for name in IMPORTS if name != "serve"}
STARTED |= {f"scripts/{name}.py": f"{name}.py" for name in ("plot", "pictures")}
STARTED |= {f"-mbench.{name}": f"bench.{name}"
            for name in ("train", "decode", "memory", "data", "serve")}


def without_packages(argument, *flags):
    argv = [sys.executable, *flags, argument]
    return subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT,
                          env={"PATH": os.environ["PATH"]}, cwd=ROOT)


@pytest.mark.parametrize("argument", STARTED)
def test_a_python_without_the_packages_is_named_in_one_line(argument):
    """As in a new terminal, where the environment is not active. -S: no site-packages."""
    done = without_packages(argument, "-S")

    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{STARTED[argument]}: this Python has no ")
    assert ".venv/bin/activate" in line and line.endswith("`pip install -r requirements.txt`")


def test_a_python_that_is_too_old_is_named_in_one_line():
    source = ("import sys; sys.version_info = (3, 10, 12); sys.argv = ['train.py']; "
              "import minillm.early_exit")

    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True,
                          timeout=LIMIT, cwd=ROOT)

    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("train.py: this is Python 3.10, and 3.11 or newer is needed")


def test_of_a_package_for_serving_the_other_list_is_named(tmp_path):
    (tmp_path / "program.py").write_text("import minillm.early_exit, uvicorn")
    os.symlink(os.path.join(ROOT, "minillm"), tmp_path / "minillm")

    done = without_packages(str(tmp_path / "program.py"), "-S")

    assert done.returncode == 2
    assert done.stderr.endswith("`pip install -r requirements-serve.txt`\n")


def test_who_imports_a_program_keeps_ctrl_c():
    """A test, or a notebook: there Ctrl-C must raise KeyboardInterrupt, as always."""
    source = "import signal, prepare_sft; print(signal.getsignal(signal.SIGINT).__name__)"

    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True,
                          timeout=LIMIT, cwd=ROOT)

    assert done.stdout == "default_int_handler\n", done.stderr


@pytest.mark.parametrize("given, expected", [
    ({}, "2000"),
    ({"GOMP_SPINCOUNT": "7"}, "7"),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
], ids=["nothing", "a count", "a policy"])
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(given, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in names} | given
    # OpenMP reads it when torch is imported: it must be there before
    code = ("import minillm.early_exit, os, sys; "
            "print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))")

    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True,
                          text=True, timeout=LIMIT)

    assert (done.stdout, done.stderr) == (f"False {expected}\n", "")
