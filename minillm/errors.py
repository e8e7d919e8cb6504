"""The error policy: what the user can put right is one line on stderr and exit status 2.

    raise UserError("block_size=0 must be at least 1")
    if __name__ == "__main__":
        run(main)

Anything else is a bug and keeps its traceback.
"""
import os
import sys


class UserError(Exception):
    """Something the user can put right: a bad flag, a missing file. One line of text."""


def run(main):
    """Call `main()`; for what the user can put right, print one line and exit with status 2."""
    _open_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # a file's name need not be UTF-8
    try:
        main()
    except UserError as error:
        sys.exit(_report(error))
    except (MemoryError, RuntimeError) as error:
        advice = _advice(error)
        if advice is None:
            raise
        sys.exit(_report(advice))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                      # `python sample.py | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


def _open_closed_streams():
    """Give a program that was started with closed streams (`>&-`) empty ones.

    Otherwise the next file that it opens takes their place, and a warning is written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)       # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _advice(error):
    """What to do about an error of torch that the user can put right, or None."""
    text, kind = str(error), type(error).__name__
    # torch says it in a class of its own on a GPU, in a plain RuntimeError on a CPU
    no_memory = isinstance(error, MemoryError) or kind == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in text:
        reason = text.split("\n")[0].split(". If ")[0][-200:]
        return (f"out of memory ({reason}): a smaller batch_size, block_size or model takes less")
    if any(sign in text for sign in ("InvalidCxxCompiler", "No working C++ compiler")):
        return "compile=True needs a C++ compiler: install g++, or leave compile out"
    if "Failed to find C compiler" in text:
        return "compile=True needs a C compiler: install gcc, or leave compile out"
    return None


def _report(error):
    line = " ".join(str(error).split("\n")).strip()
    print(f"{_program()}: {line}", file=sys.stderr, flush=True)
    return 2


def _program():
    """What the user started: "train.py", or "bench.train" of `python -m bench.train`."""
    folder, name = os.path.split(sys.argv[0])
    if os.path.exists(os.path.join(folder, "__init__.py")):
        return os.path.basename(folder) + "." + name.removesuffix(".py")
    return name
