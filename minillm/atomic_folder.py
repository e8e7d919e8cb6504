"""Replacing an output folder as a whole.

Whoever looks, at any moment, finds the old files or the new ones.

    with replaced_folder("data/pretrain", {"train.bin", "val.bin", "meta.json"}) as folder:
        ...                     # write into `folder`; an exception leaves data/pretrain as it was

The files are written into a hidden folder beside the final one, synced, and the two folders change
places in one system call. A run that was killed leaves only that hidden folder, which the next run
removes. A second run into the same folder, while one is at work, is refused.
"""
import contextlib
import ctypes
import fcntl
import os
import shutil
import sys

from minillm.errors import UserError


@contextlib.contextmanager
def replaced_folder(path, names):
    """Yield an empty folder that takes the place of `path` at the end of the block.

    `names` are the files that the new folder will hold. Because the old folder goes as a whole, a
    `path` that holds anything else is refused (UserError), as is a second run at the same time.
    """
    path = os.path.realpath(path)
    parent, name = os.path.split(path)
    try:
        os.makedirs(parent, exist_ok=True)
        strangers = sorted(set(os.listdir(path)) - set(names)) if os.path.exists(path) else []
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None
    if strangers:
        raise UserError(f"{path} holds other things ({', '.join(strangers[:3])}): give --out_dir a folder of its own")
    if os.path.ismount(path):
        raise UserError(f"{path} is a mount point, which cannot be replaced: give --out_dir a folder below it")
    with _locked(os.path.join(parent, f".{name}.lock"), path):
        fresh = os.path.join(parent, f".{name}.partial")
        _bring_back(fresh + ".old", path)
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            os.mkdir(fresh)
            yield fresh
            for file in os.listdir(fresh):
                sync(os.path.join(fresh, file))
            sync(fresh)
            _take_place(fresh, path)
            sync(parent)
        except OSError as error:                 # disk full, above all
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(fresh, ignore_errors=True)     # after the exchange: the old files


@contextlib.contextmanager
def _locked(lock, path):
    """Hold the lock file; it is removed at the end, so one may have gone between open and flock."""
    try:
        while True:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(lock) and os.path.sameopenfile(handle, (again := os.open(lock, os.O_RDONLY))):
                    os.close(again)
                    break
            except FileNotFoundError:
                pass
            os.close(handle)
    except BlockingIOError:
        raise UserError(f"another run is writing {path}: wait for it, or choose another --out_dir") from None
    except OSError as error:
        raise UserError(f"cannot write beside {path}: {error.strerror}") from None
    try:
        yield
    finally:
        os.unlink(lock)
        os.close(handle)


def _take_place(fresh, path):
    """Rename `fresh` to `path`; if `path` is there, exchange the two in one step."""
    if not os.path.exists(path):
        return os.rename(fresh, path)
    if not _exchange(fresh, path):
        # neither Linux nor macOS, or a file system without it (some network ones): two steps, with
        # a moment between them in which `path` is missing; see _bring_back
        old = fresh + ".old"
        os.rename(path, old)
        os.rename(fresh, path)
        shutil.rmtree(old, ignore_errors=True)


def _bring_back(old, path):
    """Put right what a run left that was killed between the two steps, or just behind them."""
    if os.path.exists(old) and not os.path.exists(path):
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a, b):
    """Exchange two paths atomically; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(a), os.fsencode(b)
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(a, b, 2) == 0                     # RENAME_SWAP
        return libc.renameat2(-100, a, -100, b, 2) == 0              # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False


def sync(path):
    """Bring a file, or the names in a folder, to the disk: they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
