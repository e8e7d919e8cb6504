"""Keep the code excerpts and the printed outputs of the documents true.

    python scripts/excerpts.py docs/TOUR.md docs/TOUR_ZH.md            # names what is stale
    python scripts/excerpts.py docs/TOUR.md --write                    # refresh it

A document marks what it quotes by a comment above a fenced block:

    <!-- code model.py Attention.forward -->         a definition, all of it
    <!-- code model.py GPT 'def logits(' 2 -->       2 lines, from the first that has this text
    <!-- run python -m demo.town -->                 the command, and what it prints
    <!-- ran python train.py -->                     printed once, too long to repeat: left alone

The line between the comment and the block names the file and its lines; it is refreshed too. With
--run=False commands are not repeated.
"""
import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from minillm.configurator import configure, positional
from minillm.errors import UserError, reason, run

BLOCK = re.compile(
    r"<!-- (?P<kind>code|run) (?P<what>(?:(?!-->).)+?)\s-->\n(?P<label>(?!```)[^\n]*\n)?"
    r"```(?P<language>\w*)\n(?P<body>.*?)```\n", re.DOTALL)


@dataclass
class Settings:
    files: list[str] = positional()   # documents
    write: bool = False               # refresh what is stale
    run: bool = True                  # repeat the commands


def read(path):
    """The text of a file. UserError if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


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
    """(label, text) of "FILE DEFINITION", or of "FILE DEFINITION 'TEXT' LINES"."""
    path, name, *place = shlex.split(what)
    source = read(os.path.join(ROOT, path))
    lines = source.splitlines()
    node = definition(ast.parse(source), name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno
    if place:
        text, count = place
        found = [number for number in range(first, last + 1) if text in lines[number - 1]]
        if not found:
            raise UserError(f"{path}: {name} has no line with {text}")
        first, last = found[0], min(last, found[0] + int(count) - 1)
    quoted = lines[first - 1: last]
    indent = min(len(line) - len(line.lstrip()) for line in quoted if line.strip())
    text = "".join(f"{line[indent:]}\n" for line in quoted)
    return f"`{path}:{first}-{last}`\n", text


def output(command):
    """The command and what it prints, run by a shell where this script was started."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(["bash", "-c", command], capture_output=True,
                          encoding="utf-8", env=environment)
    if done.returncode:
        raise UserError(f"{command} ended with status {done.returncode}: {done.stderr[-300:]}")
    lines = [command] if "<<" in command else command.splitlines()
    return "".join(f"$ {line}\n" for line in lines) + done.stdout


def refreshed(text, repeat):
    """`text` with its excerpts as the code stands now and, with `repeat`, its outputs renewed."""
    def renew(match):
        label = match["label"] or ""
        body = match["body"]
        if match["kind"] == "code":
            label, body = excerpt(match["what"])
        elif repeat:
            body = output(match["what"])
        mark = match[0][:match[0].index("-->\n")] + "-->\n"
        return f"{mark}{label}```{match['language']}\n{body}```\n"
    return BLOCK.sub(renew, text)


def main():
    s = configure(Settings)
    if not s.files:
        raise UserError("name the documents to check, for instance docs/TOUR.md")
    stale = []
    for path in s.files:
        old = read(path)
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
