"""Keep the code excerpts and the printed outputs of the documents true.

    python scripts/excerpts.py docs/TOUR.md docs/TOUR_ZH.md            # names what is stale
    python scripts/excerpts.py docs/TOUR.md --write                    # refresh it

A document marks what it quotes by a comment above a fenced block:

    <!-- code model.py Attention.forward 3-12 -->    lines 3 to 12 of that definition, or all of it
    <!-- run python -m demo.town -->                 what the command prints
    <!-- ran python train.py -->                     printed once, too long to repeat: left alone

The line between the comment and the block names the file and its lines; it is refreshed too. With
--run=False commands are not repeated.
"""
import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from minillm.configurator import configure, positional
from minillm.errors import UserError, run

BLOCK = re.compile(
    r"<!-- (?P<kind>code|run) (?P<what>.+?) -->\n(?P<label>(?!```)[^\n]*\n)?"
    r"```(?P<language>\w*)\n(?P<body>.*?)```\n", re.DOTALL)


@dataclass
class Settings:
    files: list[str] = positional()   # documents
    write: bool = False               # refresh what is stale
    run: bool = True                  # repeat the commands


def definition(tree, name):
    """The node of `name`, such as "GPT.forward", in a module's syntax tree. UserError if absent."""
    node = tree
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if not found:
            raise UserError(f"{name} is not defined: no {part}")
        node = found[0]
    return node


def excerpt(what):
    """(label, text) of "FILE DEFINITION" or "FILE DEFINITION FIRST-LAST"."""
    path, name, *lines = what.split()
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        source = file.read()
    node = definition(ast.parse(source), name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno
    if lines:
        start, stop = map(int, lines[0].split("-"))
        if not 1 <= start <= stop <= last - first + 1:
            raise UserError(f"{path} {name} has {last - first + 1} lines, not {lines[0]}")
        first, last = first + start - 1, first + stop - 1
    quoted = source.splitlines()[first - 1: last]
    indent = min(len(line) - len(line.lstrip()) for line in quoted if line.strip())
    text = "".join(f"{line[indent:]}\n" for line in quoted)
    return f"`{path}:{first}-{last}`\n", text


def output(command):
    """What a shell command prints when it runs in the root of the project."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(["bash", "-c", command], cwd=os.getcwd(), capture_output=True,
                          encoding="utf-8", env=environment)
    if done.returncode:
        raise UserError(f"{command} ended with status {done.returncode}: {done.stderr[-300:]}")
    return done.stdout


def refreshed(text, repeat):
    """`text` with its excerpts as the code stands now and, with `repeat`, its outputs renewed."""
    def renew(match):
        label = match["label"] or ""
        body = match["body"]
        if match["kind"] == "code":
            label, body = excerpt(match["what"])
        elif repeat:
            body = output(match["what"])
        mark = f"<!-- {match['kind']} {match['what']} -->\n"
        return f"{mark}{label}```{match['language']}\n{body}```\n"
    return BLOCK.sub(renew, text)


def main():
    s = configure(Settings)
    if not s.files:
        raise UserError("name the documents to check, for instance docs/TOUR.md")
    stale = []
    for path in s.files:
        with open(path, encoding="utf-8") as file:
            old = file.read()
        new = refreshed(old, s.run)
        if new != old and s.write:
            with open(path, "w", encoding="utf-8") as file:
                file.write(new)
        elif new != old:
            stale.append(path)
    if stale:
        raise UserError(f"stale: {', '.join(stale)}; --write refreshes them")


if __name__ == "__main__":
    run(main)
