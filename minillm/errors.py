"""The error policy: what the user can put right is one line on stderr and exit status 2.

    raise UserError("block_size=0 must be at least 1")
    if __name__ == "__main__":
        run(main)

Anything else is a bug and keeps its traceback.
"""
import os
import sys


class UserError(Exception):
    """Something the user can put right: a bad flag, a missing file, a mismatch. One line of text."""


def run(main):
    """Call `main()`; on UserError, and when memory runs out, print one line and exit with status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # a file's name need not be UTF-8
    try:
        main()
    except UserError as error:
        sys.exit(_report(error))
    except (MemoryError, RuntimeError) as error:
        # torch says it in a class of its own on a GPU, in a plain RuntimeError on a CPU
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)):
            raise
        reason = str(error).split("\n")[0].split(". If ")[0][-200:]
        sys.exit(_report(f"out of memory ({reason}): a smaller batch_size, block_size or model takes less"))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                      # `python sample.py | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


def _report(error):
    line = " ".join(str(error).split("\n")).strip()
    print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr, flush=True)
    return 2
