"""Replacing an output folder, or a file, as a whole: a reader finds all old files or all new ones.

    with replaced_folder("data/pretrain", {"train.bin", "val.bin", "meta.json"}) as folder:
        ...                     # write into `folder`; an exception leaves data/pretrain as it was

The files are written into a hidden folder beside the final one, synced, and the two folders change
places in one system call. A run that was killed leaves only that hidden folder, which the next run
removes. A second run into the same folder, while one is at work, is refused.
"""
import contextlib
import ctypes
import errno
import os
import shutil
import sys

import filelock

from minillm.errors import UserError, reason


@contextlib.contextmanager
def replaced_file(path):
    """Yield a temporary name beside `path`; at the end of the block, that file takes its place.

    After an exception nothing is left. Every process has a name of its own. A link stays, and what
    it leads to is replaced; OSError for what is there and is no file, such as /dev/null.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is not a file", path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def refuse_strangers(path, strangers, flag):
    """Raise UserError if there are `strangers`, names in the folder `path` that `flag` chose."""
    if strangers:
        raise UserError(f"{path} holds other things ({', '.join(strangers[:3])}): "
                        f"give {flag} a folder of its own")


@contextlib.contextmanager
def replaced_folder(path, names, flag="--out_dir"):
    """Yield an empty folder that takes the place of `path` at the end of the block.

    `names` are the files that the new folder will hold. Because the old folder goes as a whole, a
    `path` that holds anything else is refused (UserError), as is a second run at the same time.
    `flag`: the one that chose `path`, for messages.
    """
    path = os.path.realpath(path)
    parent, name = os.path.split(path)
    try:
        os.makedirs(parent, exist_ok=True)
        strangers = sorted(set(os.listdir(path)) - set(names)) if os.path.exists(path) else []
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None
    refuse_strangers(path, strangers, flag)
    if os.path.ismount(path):
        raise UserError(f"{path} is a mount point, which cannot be replaced: "
                        f"give {flag} a folder below it")
    with _locked(os.path.join(parent, f".{name}.lock"), path, flag):
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
            raise UserError(f"cannot write {path}: {reason(error)}") from None
        finally:
            shutil.rmtree(fresh, ignore_errors=True)     # after the exchange: the old files


@contextlib.contextmanager
def _locked(lock, path, flag):
    held = hold(lock, f"another run is writing {path}", flag)
    try:
        yield
    finally:
        # removed while still held: a process that waits for it notices that it has no name any
        # more. (Windows does not remove an open file: there it stays, empty)
        with contextlib.suppress(OSError):
            os.unlink(lock)
        held.release()


def hold(lock, busy, flag="--out_dir"):
    """Hold the lock file `lock` until release() or the end of this process; returns the lock.

    Raises UserError that begins with `busy` if another process holds it.
    """
    held = filelock.FileLock(lock)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{busy}: wait for it, or choose another {flag}") from None
    except NotImplementedError:
        pass                                     # a file system without locks
    except OSError as error:
        raise UserError(f"cannot write to {os.path.dirname(lock)}: {error.strerror}") from None
    return held


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
    """Repair the folder of a run that was killed between the two steps, or just after them."""
    if os.path.exists(old) and not os.path.exists(path):
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a, b):
    """Exchange two paths atomically; False where the system cannot."""
    a, b = os.fsencode(a), os.fsencode(b)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(a, b, 2) == 0                     # RENAME_SWAP
        return libc.renameat2(-100, a, -100, b, 2) == 0              # AT_FDCWD, RENAME_EXCHANGE
    except (AttributeError, TypeError):          # another system; Windows knows no CDLL(None)
        return False


def sync(path):
    """Bring a file, or the names in a folder, to the disk: they survive a power cut."""
    folder = os.path.isdir(path)
    try:
        # Windows syncs what is open for writing, and opens no folders
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
