"""Imported first by a program: while it imports the rest, Ctrl-C ends it at once, exit status 130.

KeyboardInterrupt would print a traceback, or be lost in a library. errors.run() brings it back for
main(), which may have to tidy up.
"""
import os
import signal

# in the background of a shell it may be ignored, and stays so
if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
