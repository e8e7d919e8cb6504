"""Bad input: a case, the check that it ends well, and the cases that all programs share.

It ends well with exit status 2 and one helpful line. Every file is as before, and none is new.
"""
import hashlib
import os
import re
from contextlib import chdir
from typing import Callable, NamedTuple

import pytest

from support import processes
from support.damage import make, put


class Case(NamedTuple):
    name: str
    argv: str                                    # the arguments, parted by spaces
    says: str                                    # a pattern that the line must hold
    spoil: Callable = None                       # called first, in the project's folder
    stdin: bytes = b""


def parametrize(cases):
    """The decorator that runs a test once for each case."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def tree(folder):
    """{path: what it holds} of every file and folder below `folder`."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(where, name), folder)] = "folder"
        for name in files:
            path = os.path.join(where, name)
            if os.path.islink(path):
                found[os.path.relpath(path, folder)] = ("link", os.readlink(path))
                continue
            with open(path, "rb") as file:
                content = hashlib.sha256(file.read()).hexdigest()
            found[os.path.relpath(path, folder)] = (os.stat(path).st_mode, content)
    return found


def check(project, program, case):
    """The case ends well."""
    if case.spoil:
        with chdir(project):
            case.spoil()
    before = tree(project)

    done = processes.run(program, case.argv.split(), folder=project, stdin=case.stdin)

    assert done.status == 2, f"exit {done.status}\n{done.output}"
    line = done.err.strip()
    assert len(line.splitlines()) == 1 and line.startswith(processes.prefix(program)), done.err
    assert len(line) < 500 and re.search(case.says, line), line
    after = tree(project)
    changed = sorted(set(after.items()) ^ set(before.items()))
    assert not changed, f"left behind or changed: {changed}"


def common(key, near):
    """Cases of a bad flag or config file. key takes a whole number; near is misspelt."""
    return [
        Case("unknown flag", f"--{near}=1", f"unknown flag --{near}: did you mean {key}"),
        Case("nothing near", "--xyzzyxyzzy=1", "unknown flag --xyzzyxyzzy: see --help"),
        Case("ill-typed flag", f"--{key}=many", f"--{key} takes a whole number, not 'many'"),
        Case("fraction for a whole number", f"--{key}=1.5",
             f"--{key} takes a whole number, not '1.5'"),
        Case("infinity for a whole number", f"--{key}=inf",
             f"--{key} takes a whole number, not 'inf'"),
        Case("NaN for a whole number", f"--{key}=nan", f"--{key} takes a whole number, not 'nan'"),
        Case("flag without a value", f"--{key}", f"--{key} needs a value"),
        Case("one dash", f"-{key}=1", f"flags begin with two dashes: --{key}"),
        Case("config file missing", "nowhere.py",
             "cannot read config file nowhere.py: No such file"),
        Case("config file is a folder", "folder.py",
             "cannot read config file folder.py: Is a directory", make("folder.py")),
        Case("config file that raises", "bad.py",
             "config file bad.py, line 1: ZeroDivisionError: division by zero",
             put("bad.py", "x = 1 / 0\n")),
        Case("config file that leaves", "bad.py",
             "config file bad.py, line 2: SystemExit", put("bad.py", "import sys\nsys.exit(0)\n")),
        Case("config file that is no Python", "bad.py",
             "config file bad.py: SyntaxError", put("bad.py", "batch size = 3\n")),
        Case("config file that is not UTF-8", "bad.py",
             "cannot read config file bad.py", put("bad.py", b"# \xb0\xae\n")),
        Case("config file with NUL", "bad.py", "config file bad.py: ", put("bad.py", b"a = 1\0\n")),
        Case("unknown key in a config file", "bad.py",
             f"unknown key in bad.py: {near}: did you mean {key}", put("bad.py", f"{near} = 1\n")),
        Case("ill-typed key in a config file", "bad.py",
             f"bad.py: {key} takes a whole number, not 'many'", put("bad.py", f"{key} = 'many'\n")),
        Case("infinity in a config file", "bad.py",
             f"bad.py: {key} takes a whole number, not inf",
             put("bad.py", f"{key} = float('inf')\n")),
    ]
