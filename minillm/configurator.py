"""Settings of a stage: a dataclass, then config files, then flags; the later one wins.

    @dataclass
    class Settings:
        files: list[str] = positional()      # FILE...: text to read
        batch_size: int = 16                 # sequences in one micro-step

    settings = configure(Settings)           # reads sys.argv

The comment behind a field is its line in `--help`, so a key, its type, its default and its meaning
stand in one place. A config file is Python: assignments to the same keys. On the command line
`--key=value`, `--key value` and, for a bool, a lone `--key` are all understood.

Whatever the user gets wrong raises UserError; `run(main)` turns that into one line on stderr and
exit status 2. Anything else is a bug and keeps its traceback.
"""
import dataclasses
import difflib
import inspect
import os
import re
import sys
import types
import typing

from minillm.errors import UserError


def positional():
    """A field that collects the arguments without `--` (input files); it has no flag of its own."""
    return dataclasses.field(default_factory=list)


def configure(cls, argv=None):
    """Return a `cls` filled from its defaults, config files and flags, in the order of `argv`.

    `argv` defaults to sys.argv[1:]. Positional arguments that end in .py are config files; the
    others go to the field made with `positional()`. Raises UserError on an unknown key (naming the
    nearest), a value of the wrong type, or an unreadable config file. `--help` prints and exits 0.
    `.given` of the result is the set of keys that config files and flags set.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = typing.get_type_hints(cls)
    inputs = [f.name for f in dataclasses.fields(cls) if f.default_factory is list]
    settings = cls()
    settings.given = set()                       # the keys that were set, be it to their default
    while argv:
        argument = argv.pop(0)
        if argument in ("-h", "--help"):
            print(help_text(cls))
            sys.exit(0)
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            key = key.replace("-", "_")
            _check_key(key, hints, inputs, "flag")
            if not equals:
                if hints[key] is bool and not (argv and argv[0] in _BOOLS):
                    text = "True"
                elif argv and not argv[0].startswith("--"):
                    text = argv.pop(0)
                else:
                    raise UserError(f"--{key} needs a value, as in --{key}={getattr(settings, key)!r}")
            setattr(settings, key, _parse(text, hints[key], f"--{key}"))
            settings.given.add(key)
        elif argument.startswith("-") and len(argument) > 1:
            raise UserError(f"flags begin with two dashes: -{argument}")
        elif argument.endswith(".py"):
            for key, value in _read_config(argument, hints, inputs).items():
                setattr(settings, key, value)
                settings.given.add(key)
        elif inputs:
            getattr(settings, inputs[0]).append(argument)
        else:
            raise UserError(f"unexpected argument {argument!r}: flags look like --key=value, config files end in .py")
    return settings


def help_text(cls):
    """The text of `--help`: the first lines of the script's docstring, then one line a key."""
    script = sys.modules[cls.__module__]
    lines = [(script.__doc__ or "").strip(), "", "keys (as --key=value, or key = value in a config file):"]
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        if field.default_factory is list:
            lines.append(f"  {'FILE...':<34} {comments.get(field.name, '')}")
        else:
            lines.append(f"  --{field.name + '=' + _show(field.default):<32} {comments.get(field.name, '')}")
    return "\n".join(lines)


def field_comments(cls):
    """{field name: the comment behind it}, base classes included, read from the source."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            match = re.match(r"    (\w+): [^#]*#\s*(.*)", line)
            if match:
                comments[match[1]] = match[2]
    return comments


_BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


def _show(value):
    return value if isinstance(value, str) and value else repr(value)


def _check_key(key, hints, inputs, kind):
    if key in hints and key not in inputs:
        return
    near = difflib.get_close_matches(key, [name for name in hints if name not in inputs], 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    raise UserError(f"unknown {kind} {'--' if kind == 'flag' else ''}{key}: {hint}")


def _optional(hint):
    """(type, may be None) of `int` or `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(t for t in hint.__args__ if t is not type(None)), True
    return hint, False


def _parse(text, hint, where):
    """Turn the text of a flag into a value of the field's type."""
    kind, optional = _optional(hint)
    if optional and text in ("None", "none", ""):
        return None
    if kind is bool:
        if text not in _BOOLS:
            raise UserError(f"{where} takes True or False, not {text!r}")
        return _BOOLS[text]
    if kind is str:
        return text
    try:
        if kind is int:
            value = text.replace("_", "")
            # 1e6 is a natural way to write a count; it must still be whole
            return int(value) if re.fullmatch(r"[+-]?\d+", value) else _whole(float(value))
        return float(text)
    except (ValueError, OverflowError):
        raise UserError(f"{where} takes {_kind_name(kind)}, not {text!r}") from None


def _whole(number):
    if number != int(number):
        raise ValueError
    return int(number)


def _kind_name(kind):
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text"}.get(kind, str(kind))


def _read_config(path, hints, inputs):
    """Run the config file `path` and return the keys it sets, checked against the types."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {getattr(error, 'strerror', error)}") from None
    namespace = {}
    try:
        exec(compile(source, path, "exec"), namespace)
    except (Exception, SystemExit) as error:      # the file is the user's program; its faults are theirs
        raise UserError(f"config file {path}: {type(error).__name__}: {error}") from None
    values = {}
    for key, value in namespace.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        _check_key(key, hints, inputs, f"key in {path}:")
        kind, optional = _optional(hints[key])
        if kind is float and type(value) is int:
            value = float(value)
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if not (type(value) is kind or (optional and value is None)):
            raise UserError(f"{path}: {key} takes {_kind_name(kind)}, not {value!r}")
        values[key] = value
    return values
