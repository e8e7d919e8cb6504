"""Encoding on all cores, in the order of the input: the same result for any number of processes.

    for result in encode_ahead(encode, blocks, processes=16): …

One process: `blocks` are read on another thread and two calls of `encode` run at a time, so that
the library's threads have work while Python packs the ids of the previous block. More processes:
each has a copy of `encode` and one thread. Threads of one process share an allocator and scale to
about 16 cores only; processes scale further.

The processes end with this one, also after an error, Ctrl-C or SIGKILL.
"""
import collections
import concurrent.futures
import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import sys
import threading

from minillm.errors import UserError

AHEAD = 2                    # blocks in flight per process; memory is a few blocks for each
# A forked process is there in milliseconds and shares the tokenizer's memory. A spawned one imports
# everything and loads the tokenizer again, but macOS's libraries break after a fork
START = "fork" if sys.platform == "linux" else "spawn"
# bytes of input that one process encodes before others have started
SMALL = (8 if START == "fork" else 32) << 20
WORKERS = {
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # and tokenizers prints no warning about the fork
    "TOKENIZERS_PARALLELISM": "false",
    # no word about semaphores when this process is killed
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}


def default_processes(size):
    """How many processes to use for `size` bytes of input: one per core, or one for a small one."""
    return 1 if size < SMALL else available_cores()


def available_cores():
    if hasattr(os, "sched_getaffinity"):                 # Linux: a container may have fewer
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_ahead(encode, blocks, processes=1):
    """Yield encode(block) for every block, in order, reading and encoding ahead."""
    reader = in_background(blocks)
    with _pool(encode, processes) as (submit, workers), contextlib.closing(reader):
        futures, error = collections.deque(), None
        try:
            for block, error in reader:
                if error:                        # what was read before it comes first
                    break
                futures.append(submit(block))
                if len(futures) >= AHEAD * workers:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
            if error:
                raise error
        except concurrent.futures.BrokenExecutor:
            raise UserError("a process that encodes was killed, perhaps for memory: "
                            f"--processes={max(1, workers // 2)} takes less") from None
        finally:
            for future in futures:
                future.cancel()


@contextlib.contextmanager
def _pool(encode, processes):
    """Yield (submit, workers): submit(block) gives a future of encode(block)."""
    if processes == 1:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            yield lambda block: pool.submit(encode, block), 2
        return
    # the write end closes with this process, however that ends
    alive, write_end = multiprocessing.Pipe(duplex=False)
    inherited = write_end if START == "fork" else None
    start = multiprocessing.get_context(START)

    def submit(function, *arguments):
        with _signals_held(), _environment_of_workers():     # it may start a process
            return pool.submit(function, *arguments)
    try:
        pool = concurrent.futures.ProcessPoolExecutor(
            processes, start, _begin_worker, (encode, alive, inherited))
        # all are forked here, before the thread that reads begins: its locks would stay locked in
        # them. (tqdm has a thread too, which they never touch)
        submit(_begun)
    except OSError as error:
        for process in multiprocessing.active_children():
            process.kill()                       # nobody else would end those that have started
        # a limit on processes, or memory; or no place for the locks of several: /dev/shm
        few = error.errno in (errno.EAGAIN, errno.ENOMEM)
        fewer = max(1, processes // 2) if few else 1
        raise UserError(f"cannot start {processes} processes ({error.strerror}): "
                        f"--processes={fewer} takes fewer") from None
    try:
        yield lambda block: submit(_encode_in_worker, block), processes
    finally:
        pool.shutdown(cancel_futures=True)
        write_end.close()


@contextlib.contextmanager
def _signals_held():
    """Block Ctrl-C: a new process inherits the block, and only this one receives it later."""
    if not hasattr(signal, "pthread_sigmask"):           # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment_of_workers():
    """The environment in which the libraries of a new process use one thread."""
    before = {name: os.environ.get(name) for name in WORKERS}
    os.environ.update(WORKERS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_encode = None               # of a worker process


def _begin_worker(encode, alive, inherited):
    """Called first in each worker process."""
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if inherited:
        inherited.close()
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive):
    """End this process as soon as its parent has, even by SIGKILL.

    alive: the end to read of a pipe that only the parent can write to. (multiprocessing's sentinel
    of the parent is held open by the processes forked later: one would end after the other.)
    """
    multiprocessing.connection.wait([alive])
    os._exit(1)


def _begun():
    """The first call, which lets the processes start."""


def _encode_in_worker(block):
    return _encode(block)


def in_background(iterable):
    """Iterate on another thread, two items ahead: yields (item, None), or (None, an exception)."""
    items, stop = queue.Queue(2), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                pass

    def produce():
        try:
            for item in iterable:
                put((item, None))
                if stop.is_set():
                    return
        except BaseException as error:
            put((None, error))
        put(None)                                # the end

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while pair := items.get():
            yield pair
    finally:
        stop.set()
        thread.join()
