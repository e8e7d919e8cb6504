"""Time in a child, counted in calls of functions: a busy machine does not stretch it."""
import mmap
import os
import signal
import sys


class CallClock:
    """Counts a child's calls and returns of functions in `ticks[0]`, which the parent reads."""

    def __init__(self):
        self.ticks = memoryview(mmap.mmap(-1, 8)).cast("Q")     # shared with the child

    def start(self, last=None):
        """In the child: count from 0; SIGKILL at tick `last`."""
        ticks = self.ticks
        ticks[0] = 0

        def tick(frame, event, argument):
            ticks[0] += 1
            if ticks[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(tick)
