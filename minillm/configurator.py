"""Settings of a stage: a dataclass, then config files and flags; the later one wins.

    @dataclass
    class Settings:
        files: list[str] = positional()         # FILE...: text to read
        # the data of a step
        batch_size: Positive = 16               # sequences in one micro-step
        n_layer: whole(1, 10_000) = 2           # blocks
        dtype: Literal["auto", "float32"] = "auto"      # of the matmuls

    settings = configure(Settings)              # reads sys.argv

A key, its type, its bounds, its default and its meaning stand in one place: the comment behind a
field is its line in `--help`, a comment on a line of its own is the heading of a group. A config
file is Python: assignments to the same keys. Flags are `--key=value`, `--key value` or, for a bool,
a bare `--key`. None, which `--help` shows as auto, leaves the choice to the program.

A mistake of the user raises UserError; `run(main)` turns it into one line on stderr and exit status
2. Any other exception is a bug and keeps its traceback.
"""
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import traceback
import types
import typing
from typing import Annotated, Literal

from minillm.errors import UserError, brief

# with all that end in _dir: a ~ before them means the home folder, which no shell sees behind "="
PATHS = ("tokenizer", "init_from", "questions", "choices", "out")
HOW_TO_SET = """\
Settings and their defaults. Give --key=value or --key value; --key alone means True. An argument
FILE.py is a config file, with lines key = value. Files and flags apply in order: the last wins."""
LARGEST = 10**10             # the upper bound of a number that has no bound of its own


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number may be: least <= value <= most, above < value < below. A NaN never fits."""
    least: float = -math.inf
    most: float = LARGEST
    above: float = -math.inf
    below: float = math.inf

    def check(self, key, value):
        """Raise UserError if `value` is out of bounds."""
        if self.least <= value <= self.most and self.above < value < self.below:
            return
        rules = []
        if self.above > -math.inf:
            rules.append(f"above {self.above}")
        elif self.least > -math.inf:
            rules.append(f"at least {self.least}")
        if self.below < math.inf:
            rules.append(f"below {self.below}")
        elif self.most != LARGEST or value > self.most:
            rules.append(f"at most {self.most:,}")
        raise UserError(f"{key}={brief(value)} must be {' and '.join(rules)}")


def whole(least=-LARGEST, most=LARGEST):
    """The type of a whole number between two bounds, both allowed."""
    return Annotated[int, Bounds(least, most)]


def number(least=-math.inf, most=LARGEST, above=-math.inf, below=math.inf):
    """The type of a number between bounds; `above` and `below` are not allowed themselves."""
    return Annotated[float, Bounds(least, most, above, below)]


Positive = whole(1)
NonNegative = whole(0)
NonNegativeFloat = number(0)
Fraction = number(0, 1)
BelowOne = number(0, below=1)


def positional():
    """A field that collects the arguments without `--` (input files); it has no flag of its own."""
    return dataclasses.field(default_factory=list)


def configure(cls, argv=None):
    """Return a `cls` filled from its defaults, config files and flags, in the order of `argv`.

    `argv` defaults to sys.argv[1:]. Positional arguments that end in .py are config files; the
    others go to the field made with `positional()`. Raises UserError on an unknown key (naming the
    nearest), a value of the wrong type or out of bounds, or an unreadable config file. `--help`
    prints and exits 0. `.given` of the result is the set of keys that config files and flags set.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = typing.get_type_hints(cls, include_extras=True)
    inputs = [f.name for f in dataclasses.fields(cls) if f.default_factory is list]
    settings = cls()
    settings.given = set()                       # the keys that were set, be it to their default
    while argv:
        argument = argv.pop(0)
        if argument == "#":                      # a comment, pasted into zsh, arrives here
            break
        if argument in ("-h", "--help"):
            print(help_text(cls))
            sys.exit(0)
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            key = key.replace("-", "_")
            _check_key(key, hints, inputs, "flag")
            if not equals:
                if _parts(hints[key])[0] is bool and not (argv and argv[0] in _BOOLS):
                    text = "True"
                elif argv and not argv[0].startswith("--"):
                    text = argv.pop(0)
                else:
                    example = _show(getattr(settings, key), hints[key])
                    raise UserError(f"--{key} needs a value, as in --{key}={example}")
            setattr(settings, key, _parse(text, hints[key], f"--{key}"))
            settings.given.add(key)
        elif argument.startswith("-") and len(argument) > 1:
            raise UserError(f"flags begin with two dashes: -{argument}")
        elif argument.lower().endswith(".py"):
            for key, value in _read_config(argument, hints, inputs).items():
                setattr(settings, key, value)
                settings.given.add(key)
        elif inputs:
            getattr(settings, inputs[0]).append(argument)
        else:
            raise UserError(f"unexpected argument {argument!r}: flags look like --key=value, "
                            "config files end in .py")
    for key, hint in hints.items():
        value = getattr(settings, key)
        _check_bounds(key, value, hint)
        if isinstance(value, str) and (key.endswith("_dir") or key in PATHS):
            setattr(settings, key, os.path.expanduser(value))
    return settings


def help_text(cls):
    """The text of `--help`: the script's docstring, then one line per key, under their headings."""
    script = sys.modules[cls.__module__]
    lines = [(script.__doc__ or "").strip(), "", HOW_TO_SET]
    hints = typing.get_type_hints(cls, include_extras=True)
    written = {name: (comment, heading) for name, comment, heading in _source_of_fields(cls)}
    for field in dataclasses.fields(cls):
        comment, heading = written.get(field.name, ("", ""))
        if heading:
            lines += ["", heading]
        if field.default_factory is list:
            flag = "FILE..."
        else:
            flag = f"--{field.name}={_show(field.default, hints[field.name])}"
        meaning = _choices(hints[field.name]) + comment
        lines.append(f"  {flag:<34} {meaning}".rstrip())
    return "\n".join(lines)


def field_comments(cls):
    """{field name: the comment behind it}, base classes included, read from the source."""
    return {name: comment for name, comment, _ in _source_of_fields(cls)}


def _source_of_fields(cls):
    """Yield (name, comment behind it, comment on the lines before it) of fields with comments."""
    for base in reversed(cls.__mro__[:-1]):
        heading = []
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    # (.*)", line):
                heading.append(match[1])
            elif match := re.match(r"    (\w+): [^#]*#\s*(.*)", line):
                yield match[1], match[2], " ".join(heading)
                heading = []
            elif re.match(r"    (def|@)", line):
                break                            # methods follow; their comments are no headings


_BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


def _show(value, hint):
    """A value as it stands behind `--key=`; a None as what _parse() takes for it."""
    if value is None:
        return "''" if _parts(hint)[0] is str else "auto"
    return value if isinstance(value, str) and value else repr(value)


def _choices(hint):
    """The allowed values of a Literal, as "{a,b} "; '' for any other type."""
    _, _, allowed = _parts(hint)
    return f"{{{','.join(allowed)}}} " if isinstance(allowed, tuple) else ""


def _check_key(key, hints, inputs, kind):
    if key in hints and key not in inputs:
        return
    names = [name for name in hints if name not in inputs]
    near = [name for name in names if "_" in name and initials(name) == key]     # lr, bs
    near = near or difflib.get_close_matches(key, names, 1, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
    if kind == "flag":
        raise UserError(f"unknown flag --{key}: {hint}")
    raise UserError(f"unknown {kind} {key}: {hint} (begin a name that is no setting with _)")


def initials(name):
    """The first letters of a name's words: lr of learning_rate."""
    return "".join(word[:1] for word in name.split("_"))


def _parts(hint):
    """(type, may be None, Bounds or the allowed values or None) of a field's annotation."""
    kinds, optional = [hint], False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):       # int | None
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        optional = True
    kind = kinds[0]
    if typing.get_origin(kind) is Annotated:
        kind, bounds = typing.get_args(kind)
        return kind, optional, bounds
    if typing.get_origin(kind) is Literal:
        return str, optional, typing.get_args(kind)
    return kind, optional, None


def _check_bounds(key, value, hint):
    """Raise UserError if a value of the right type is not one that the annotation allows."""
    _, _, bounds = _parts(hint)
    if value is None or bounds is None:
        return
    if isinstance(bounds, Bounds):
        bounds.check(key, value)
    elif value not in bounds:
        raise UserError(f"{key}={value} must be one of {', '.join(bounds)}")


def _parse(text, hint, where):
    """Turn the text of a flag into a value of the field's type."""
    kind, optional, _ = _parts(hint)
    if optional and (text in ("None", "none", "") or (text == "auto" and kind is not str)):
        return None
    if kind is bool:
        if text not in _BOOLS:
            raise UserError(f"{where} takes True or False, not {text!r}")
        return _BOOLS[text]
    if kind is str:
        return text
    try:
        if kind is float:
            return float(text)
        plain = text.replace("_", "")
        if re.fullmatch(r"[+-]?\d+", plain):
            return int(plain)
        value = float(plain)                     # 1e6 is a natural way to write a count
        if value != int(value):
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise UserError(f"{where} takes {_kind_name(kind)}, not {text!r}") from None


def _kind_name(kind):
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return names.get(kind, str(kind))


def _read_config(path, hints, inputs):
    """Run the config file `path` and return the keys it sets, checked against the types."""
    try:
        # -sig: some editors begin a file with a byte order mark
        with open(path, encoding="utf-8-sig") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"cannot read config file {path}: {reason}") from None
    namespace = {}
    try:
        exec(compile(source, path, "exec"), namespace)
    except (Exception, SystemExit) as error:     # the file is the user's program, its faults too
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        place = f"{path}, line {lines[-1]}" if lines else path    # a SyntaxError says it itself
        raise UserError(f"config file {place}: {type(error).__name__}: {error}") from None
    values = {}
    for key, value in namespace.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        _check_key(key, hints, inputs, f"key in {path}:")
        kind, optional, _ = _parts(hints[key])
        if kind is float and type(value) is int and value.bit_length() <= 64:
            value = float(value)
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if not (type(value) is kind or (optional and value is None)):
            raise UserError(f"{path}: {key} takes {_kind_name(kind)}, not {brief(value)}")
        values[key] = value
    return values
