"""--compile=True without a compiler, or without its cache: one line says so, and no traceback."""
import os
import re
import subprocess
import sys

import pytest

from minillm import errors
from support import ROOT
from support.processes import LIMIT

PROGRAM = """
import torch
from minillm import errors
errors.run(lambda: torch.compile(torch.sin)(torch.ones(100)))
"""
# answers to --version, as every compiler, and fails in what it is for
FAILS = """#!/bin/sh
case "$*" in
*--version*) echo "g++ (GCC) 13.2.0" ;;
*) echo "main.cpp:1:10: fatal error: Python.h: No such file or directory" >&2
   echo "compilation terminated." >&2
   exit 1 ;;
esac
"""


@pytest.mark.parametrize("script, says", [
    (None, r"compile=True needs a C\+\+ compiler: install g\+\+, or leave compile out"),
    ("#!/bin/sh\n", r"compile=True failed \(.+\): leave compile out"),
    (FAILS, r"compile=True failed \(main.cpp:1:10: fatal error: Python.h: No such file or "
            r"directory\): leave compile out"),
], ids=["missing", "not a compiler", "fails"])
def test_a_compiler_that_fails_is_one_line(tmp_path, script, says):
    compiler = tmp_path / "g++"
    if script:
        compiler.write_text(script)
        compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=LIMIT)

    assert done.returncode == 2
    # torch built for CUDA warns that it finds none
    lines = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert len(lines) == 1 and re.fullmatch(f"-c: {says}", lines[0])


@pytest.mark.parametrize("error, says", [
    ("subprocess.CalledProcessError(1, ['/usr/bin/gcc', '-I/x/triton/y'])",
     "compile=True failed (/usr/bin/gcc did, see above): leave compile out"),
    ("type('CompilationError', (Exception,), {'__module__': 'triton.compiler.errors'})("
     "'at 3:4:\\ny = x +\\nSyntaxError: no')",
     "compile=True failed (SyntaxError: no): leave compile out"),
], ids=["its C compiler", "a kernel"])
def test_triton_that_fails_is_one_line(error, says):
    program = ("import subprocess\nfrom minillm import errors\n"
               f"def main():\n    raise {error}\nerrors.run(main)")

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True,
                          capture_output=True, timeout=LIMIT)

    assert (done.returncode, done.stderr) == (2, f"-c: {says}\n")


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_an_error_in_a_compilers_cache_names_the_variable(monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, str(tmp_path))

    advice = errors._cache_advice(PermissionError(13, "denied", str(tmp_path / "kernel")))

    assert advice == f"; the environment's {variable} leads there: give another, or unset it"


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_cache_that_cannot_be_made_is_one_line(tmp_path, folder):
    (tmp_path / "file").write_text("")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder)}

    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=LIMIT)

    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert len(lines) == 1
    assert re.fullmatch(f"-c: {tmp_path}/file.*: (File exists|Not a directory); the environment's "
                        "TORCHINDUCTOR_CACHE_DIR leads there: give another, or unset it", lines[0])
