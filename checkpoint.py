"""Checkpoints: written whole or not at all, checked before they are trusted, and never executed.

    out_dir/ckpt_00001000.pt   everything needed to go on after 1000 steps (the newest few are kept)
    out_dir/best.pt            the weights of the best validation loss
    out_dir/tokenizer/         a copy, so that the folder opens on its own
    out_dir/config.py          the resolved settings, as a config file
    out_dir/metrics.jsonl      one record a logged step

A checkpoint is what torch.save writes: a zip file, whose checksums find a flipped bit.
"""
import ast
import glob
import os
import pickle
import re
import shutil
import zipfile

import torch

from configurator import UserError


def save(path, state):
    """Write `state` to `path` under a temporary name, sync, rename: a crash leaves the old file or the new."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path))
    except BaseException:
        remove(temporary)
        raise


def sync_folder(folder):
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path):
    try:
        os.remove(path)
    except FileNotFoundError:
        pass


def step_path(folder, step):
    return os.path.join(folder, f"ckpt_{step:08d}.pt")


def saved_steps(folder):
    """The steps that `folder` has checkpoints of, newest first."""
    names = glob.glob(os.path.join(glob.escape(folder), "ckpt_*.pt"))
    steps = (re.fullmatch(r"ckpt_(\d+)\.pt", os.path.basename(name)) for name in names)
    return sorted((int(match[1]) for match in steps if match), reverse=True)


def prune(folder, keep):
    """Remove all but the newest `keep` checkpoints, and what a killed run left half-written."""
    for step in saved_steps(folder)[keep:]:
        remove(step_path(folder, step))
    for name in glob.glob(os.path.join(glob.escape(folder), "*.tmp")):
        remove(name)


def load(path, check=True, mmap=False):
    """The dict in a checkpoint, on the CPU. Raises UserError if it is not whole or holds anything but data.

    check=True reads every byte against its checksum first (about 1 s a GB); mmap=True leaves the
    tensors in the file until they are used.
    """
    try:
        if check:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: the checksum of {damaged} does not fit")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # weights_only: whatever is not a tensor, a number, text or a container of these is refused unrun
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path} was refused, it is not a plain checkpoint: {reason}") from None
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"cannot read checkpoint {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    if not isinstance(state, dict) or not {"model", "model_config", "step"} <= set(state):
        raise UserError(f"{path} is not a checkpoint of this program")
    return state


def load_newest(folder, say=print):
    """The newest checkpoint of `folder` that is whole; what is damaged is named by `say` and passed over.

    Raises UserError if there is none.
    """
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}: nothing to resume")
    for step in steps:
        try:
            return load(step_path(folder, step))
        except UserError as error:
            say(f"{error}; trying the checkpoint before it")
    raise UserError(f"every checkpoint in {folder} is damaged")


def load_for_inference(folder, which="newest"):
    """The weights in `folder`, for generation: a dict with model, model_config, step and tokenizer_dir.

    which: "newest" or "best". The tensors are memory-mapped, the optimizer's are never read.
    """
    if which not in ("newest", "best"):
        raise UserError(f"checkpoint {which!r}: newest or best")
    if not os.path.isdir(folder):
        raise UserError(f"no model in {folder}: there is no such folder; train.py makes one")
    steps = saved_steps(folder)
    best = os.path.join(folder, "best.pt")
    if which == "best" and not os.path.exists(best) or which == "newest" and not steps:
        raise UserError(f"no {which} checkpoint in {folder}; train.py writes them")
    paths = [best] if which == "best" else [step_path(folder, step) for step in steps]
    for path in paths:
        try:
            state = load(path, check=False, mmap=True)
            break
        except UserError as error:
            if path == paths[-1]:
                raise
            print(f"{error}; trying the checkpoint before it")
    state["tokenizer_dir"] = os.path.join(folder, "tokenizer")
    return state


def read_settings(folder):
    """The settings of the run that left `folder`, a dict, from its config.py. Literals only: nothing is executed."""
    path = os.path.join(folder, "config.py")
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    except (OSError, SyntaxError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def copy_tokenizer(source, folder):
    """Put the tokenizer's files into folder/tokenizer, unless they are there."""
    target = os.path.join(folder, "tokenizer")
    if os.path.abspath(source) != os.path.abspath(target):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target + ".tmp", dirs_exist_ok=True)
        os.replace(target + ".tmp", target)
