"""The error policy: what the user can correct is one line on stderr and exit status 2.

    raise UserError("block_size=0 must be at least 1")
    if __name__ == "__main__":
        run(main)

Anything else is a bug and keeps its traceback.
"""
import errno
import os
import signal
import sys

# what the machine refuses, whatever the program: a full disk, a closed terminal, a limit
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE,
           errno.ENFILE)


class UserError(Exception):
    """Something the user can correct: a bad flag, a missing file. One line of text."""


def run(main):
    """Call `main()`; for what the user can correct, print one line and exit with status 2."""
    _open_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):
        # a file's name need not be UTF-8; whoever follows a log reads each line at once
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:    # before this: early_exit.py
            signal.signal(signal.SIGINT, _on_ctrl_c)
        _check_current_folder()
        _call_and_flush(main)
    except UserError as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                      # `python sample.py | head`: the reader has gone
        write_nowhere(1)
        sys.exit(141)
    except OSError as error:
        advice = _cache_advice(error)
        if error.errno not in MACHINE and not advice:
            raise
        forget_lost_lines()
        place = error.filename or "cannot write the output"
        sys.exit(_report(f"{place}: {reason(error)}{advice}"))
    except Exception as error:
        advice = _advice(error)
        if advice is None:
            raise
        sys.exit(_report(advice))


def brief(value):
    """A value as a message shows it: its repr, at most 80 characters.

    Of a whole number above 64 bits its size: Python refuses to print more than 4,300 digits.
    """
    if isinstance(value, int) and value.bit_length() > 64:
        return f"(a number of {value.bit_length()} bits)"
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):         # such a number in a list, or lists in lists
        return f"(a {type(value).__name__})"


def reason(error):
    """The system's reason for an OSError, and what helps where the user may not know."""
    text = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        text += ": `ulimit -n 1024` allows more"
    return text


def _on_ctrl_c(number, frame):
    """Raise KeyboardInterrupt; but leave at once from inside an import, which may drop it."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _check_current_folder():
    """Raise UserError if it was deleted: libraries say so in other words, or end the program."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder was deleted: cd to one that is there") from None


def _call_and_flush(main):
    """Call main(); what it has printed is written, or an OSError says why not."""
    try:
        main()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def forget_lost_lines():
    """Do not fail at the end because of lines that could not be printed."""
    try:
        sys.stdout.flush()
    except OSError:
        write_nowhere(1)


def write_nowhere(number):
    """Let stream 1 or 2 lead nowhere, so that Python's own flush at the end does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


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
    """What to do about an error of torch or Triton that the user can correct, or None."""
    text, kind = str(error), type(error).__name__
    # torch says it in a class of its own on a GPU, in a plain RuntimeError on a CPU
    no_memory = isinstance(error, MemoryError) or kind == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in text:
        detail = text.split("\n")[0].split(". If ")[0][-200:]
        return (f"out of memory ({detail}): a smaller batch_size (of serve.py: rows), block_size "
                "or model takes less")
    if any(sign in text for sign in ("InvalidCxxCompiler", "No working C++ compiler")):
        return "compile=True needs a C++ compiler: install g++, or leave compile out"
    if "Failed to find C compiler" in text:
        return "compile=True needs a C compiler: install gcc, or leave compile out"
    if kind == "CalledProcessError" and "/triton/" in text:      # Triton called a C compiler
        return f"compile=True failed ({error.cmd[0]} did, see above): leave compile out"
    triton = type(error).__module__.startswith("triton.")
    if triton or "BackendCompilerFailed" in [base.__name__ for base in type(error).__mro__]:
        return f"compile=True failed ({_compiler_reason(text)}): leave compile out"
    return None


def _cache_advice(error):
    """What to do about an OSError where torch or Triton keeps compiled code, or ''."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        folder = os.environ.get(name)
        if not folder or not isinstance(error.filename, str):
            continue
        folder, place = os.path.abspath(folder), os.path.abspath(error.filename)
        if os.path.commonpath((folder, place)) in (folder, place):
            return f"; the environment's {name} leads there: give another, or unset it"
    return ""


def _compiler_reason(text):
    """The last line of a compiler's long message that names an error; if none does, its last."""
    lines = text.strip().split("\n")
    named = [line.strip() for line in lines if "rror: " in line]
    return (named or lines)[-1][:200]


def _report(error):
    line = " ".join(str(error).split("\n")).strip()
    try:
        print(f"{program_name()}: {line}", file=sys.stderr, flush=True)
    except OSError:                              # a full disk, or nobody reads it
        write_nowhere(2)
    return 2


def program_name():
    """What the user started: "train.py", or "bench.train" of `python -m bench.train`."""
    folder, name = os.path.split(sys.argv[0])
    if os.path.exists(os.path.join(folder, "__init__.py")):
        return os.path.basename(folder) + "." + name.removesuffix(".py")
    return name
