"""The rules of the house, read from the source by ast: what lies where, who imports whom.

A rule is a function of the house, {path: source}, that yields (path, what breaks it there).
"""
import ast
import graphlib
import pathlib

import pytest

from support import ROOT

STAGES = ["train_tokenizer", "prepare_pretrain", "prepare_sft", "train", "eval", "sample", "chat",
          "export", "serve"]
FOLDERS = ["minillm", "bench", "config", "demo", "scripts", "tests"]
LINES = {"model.py": 330, "moe.py": 150, "train.py": 400}          # any other: 330
COLUMNS = 100


def read_house():
    root = pathlib.Path(ROOT)
    paths = list(root.glob("*.py"))
    for name in FOLDERS:
        paths += root.glob(f"{name}/**/*.py")
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in sorted(paths)}


HOUSE = read_house()


def module_of(path):
    return path.removesuffix(".py").replace("/", ".").removeprefix("tests.")


def imports(house, path):
    """[(line, module)] of every import in a file, also of those in functions."""
    modules = set(map(module_of, house))
    found = []
    for node in ast.walk(ast.parse(house[path])):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.append((node.lineno, inner if inner in modules else node.module))
    return found


# ---- the rules

def root_lists_the_stages(house):
    for path in house:
        if "/" not in path and module_of(path) not in [*STAGES, "model", "moe"]:
            yield path, "is neither a stage nor a model"


def minillm_imports_nothing_of_the_others(house):
    others = {module_of(path).split(".")[0] for path in house} - {"minillm"}
    for path in house:
        for line, module in imports(house, path):
            if path.startswith("minillm/") and module.split(".")[0] in others:
                yield path, f"line {line} imports {module}"


def plain_rooms_know_nothing_of_speed(house):
    for path in house:
        for line, module in imports(house, path):
            plain = path.startswith("minillm/") and not path.startswith("minillm/speed/")
            if plain and module.startswith("minillm.speed"):
                yield path, f"line {line} imports {module}"


def no_stage_imports_a_stage(house):
    for path in house:
        for line, module in imports(house, path):
            if module_of(path) in [*STAGES, "model", "moe"] and module in STAGES:
                yield path, f"line {line} imports {module}"


def no_test_imports_a_test(house):
    for path in house:
        for line, module in imports(house, path):
            if path.startswith("tests/") and module.startswith("test_"):
                yield path, f"line {line} imports {module}"


def no_circle(house):
    graph = {module_of(path): [module for _, module in imports(house, path)] for path in house}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        yield circle[0].replace(".", "/") + ".py", " ← ".join(circle)


def no_late_import_without_a_reason(house):
    for path, source in house.items():
        lines = ["", *source.splitlines()]
        late = {node.lineno for function in ast.walk(ast.parse(source))
                if isinstance(function, (ast.FunctionDef, ast.Lambda))
                for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))}
        for line in sorted(late):
            if "#" not in lines[line] + lines[line - 1]:
                yield path, f"line {line} imports late and says not why"


def tables(source):
    """The lines of the module's constants: tables of data, which may be wide."""
    constants = [node for node in ast.parse(source).body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()]
    return {line for node in constants for line in range(node.lineno, node.end_lineno + 1)}


def no_wide_line(house):
    for path, source in house.items():
        for number, line in enumerate(source.splitlines(), 1):
            if len(line) > COLUMNS and number not in tables(source):
                yield path, f"line {number} has {len(line)} columns"


def no_long_file(house):
    for path, source in house.items():
        length, most = source.count("\n"), LINES.get(path, 330)
        if length > most:
            yield path, f"{length} lines, at most {most}"


# a rule and the smallest house that breaks it
BROKEN = {
    root_lists_the_stages: {"utils.py": ""},
    minillm_imports_nothing_of_the_others: {
        "minillm/a.py": "def f():\n    import model", "model.py": ""},
    plain_rooms_know_nothing_of_speed: {"minillm/a.py": "from minillm.speed import fused"},
    no_stage_imports_a_stage: {"eval.py": "from train import main", "train.py": ""},
    no_test_imports_a_test: {"tests/test_a.py": "from test_b import b", "tests/test_b.py": ""},
    no_circle: {
        "minillm/a.py": "from minillm import b", "minillm/b.py": "def f():\n    import minillm.a"},
    no_late_import_without_a_reason: {"eval.py": "def f():\n    import json"},
    no_wide_line: {"eval.py": "# " + "x" * 99},
    no_long_file: {"moe.py": "\n" * 151},
}


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert list(rule(HOUSE)) == []


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_house_that_breaks_it_is_seen(rule):
    assert len(list(rule(BROKEN[rule]))) == 1
