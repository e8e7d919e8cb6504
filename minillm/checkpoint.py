"""Checkpoints: written whole or not at all, checked before they are trusted, and never executed.

    out_dir/ckpt_00001000.pt   everything needed to go on after 1000 steps (the newest few are kept)
    out_dir/best.pt            the weights of the best validation loss
    out_dir/tokenizer/         a copy, so that the folder opens on its own
    out_dir/config.py          the resolved settings, as a config file
    out_dir/metrics.jsonl      one record a logged step

A checkpoint is what torch.save writes: a zip file, whose checksums find a flipped bit. One that proved
damaged when a run went on is set aside as ckpt_….pt.damaged. One process at a time writes to an out_dir.
"""
import ast
import fcntl
import glob
import hashlib
import os
import pickle
import re
import shutil
import struct
import zipfile
from dataclasses import asdict

import torch

from minillm.configurator import field_comments
from minillm.errors import UserError
from minillm.export_hf import read_model

MODEL_KEYS = {"model": dict, "model_config": dict, "step": int, "tokenizer_hash": str}
RESUME_KEYS = {"optimizer": dict, "scaler": dict, "identity": dict, "settings": dict, "best_val_loss": float, "bad_steps": list}
OF_ONE_CALL = ("overwrite", "inspect_step")      # settings that config.py leaves out


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


def lock(folder):
    """Make `folder` if need be and hold it until this process ends, however it ends. Returns the handle to keep.

    Raises UserError if another run is at work in it, or if it cannot be written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        if not os.access(folder, os.W_OK):
            raise UserError(f"no permission to write to {folder}")
    except OSError as error:
        raise UserError(f"cannot make the folder {folder!r} for out_dir: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is at work in {folder}: wait for it, or choose another --out_dir") from None
    except OSError:
        pass                                     # a file system without locks
    return handle


def clear(folder):
    """Remove the checkpoints of an older run."""
    for step in saved_steps(folder):
        remove(step_path(folder, step))
    remove(os.path.join(folder, "best.pt"))


def clean(folder, step):
    """Before going on from `step`: remove what a killed run left half-written, and set aside what is newer.

    What is newer proved to be damaged; under its own name it would count among the newest to keep.
    """
    for name in glob.glob(os.path.join(glob.escape(folder), "*.tmp")):
        if re.fullmatch(r"((ckpt_\d+|best)\.pt|config\.py|metrics\.jsonl)\.tmp", os.path.basename(name)):
            remove(name)
    shutil.rmtree(os.path.join(folder, "tokenizer.tmp"), ignore_errors=True)
    for newer in saved_steps(folder):
        if newer > step:
            os.replace(step_path(folder, newer), step_path(folder, newer) + ".damaged")


def prune(folder, keep):
    """Remove all but the newest `keep` checkpoints."""
    for step in saved_steps(folder)[keep:]:
        remove(step_path(folder, step))


def load(path, check=True, mmap=False, keys=MODEL_KEYS):
    """The dict in a checkpoint, on the CPU. Raises UserError if it is not whole or holds anything but data.

    check=True reads every byte against its checksum first (about 1 s a GB); mmap=True leaves the
    tensors in the file until they are used. keys: what it must hold, and of which type.
    """
    try:
        if check:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path} is damaged: the checksum of {damaged} does not fit")
        # torch maps only files whose name is UTF-8, reads the others
        mmap = mmap and str(path).encode("utf-8", "replace").decode() == str(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # weights_only: whatever is not a tensor, a number, text or a container of these is refused unrun
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path} was refused, it is not a plain checkpoint: {reason}") from None
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0][:120] or type(error).__name__
        raise UserError(f"cannot read checkpoint {path}, it is damaged or cut short: {reason}") from None
    missing = keys if not isinstance(state, dict) else [key for key, kind in keys.items() if not isinstance(state.get(key), kind)]
    if missing:
        raise UserError(f"{path} is not a checkpoint to {'resume' if keys is not MODEL_KEYS else 'start'} from: no {', '.join(missing)} in it")
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
            return load(step_path(folder, step), keys=MODEL_KEYS | RESUME_KEYS)
        except UserError as error:
            say(f"{error}" + ("; going on from the checkpoint before it" if step != steps[-1] else ""))
    raise UserError(f"every checkpoint in {folder} is damaged: --overwrite=True starts over")


def load_weights(model, weights):
    """Copy `weights`, a state dict, into `model`. UserError where they do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the weights in the checkpoint do not fit its own model_config, it is of another program: {reason}") from None


class skip_init(torch.overrides.TorchFunctionMode):
    """with skip_init(): a new model's weights are not drawn, so their memory is never touched.

    (The meta device has no memory at all, but its first operation imports sympy and torch._dynamo: 0.8 s.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def load_optimizer(optimizer, state):
    """Give `optimizer` the moments in `state`, but keep its own rates and decays. UserError where they do not fit:
    torch would not look, and the fused kernel would read past their end."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(parameters if state else []):
        moments = [state.get(i, {}).get(key) for key in ("exp_avg", "exp_avg_sq")]
        if not all(isinstance(m, torch.Tensor) and m.shape == p.shape for m in moments):
            raise UserError(f"the optimizer state in the checkpoint does not fit the model: parameter {i} has the shape {tuple(p.shape)}")
    optimizer.load_state_dict({"state": {i: state[i] for i in range(len(parameters))} if state else {},
                               "param_groups": optimizer.state_dict()["param_groups"]})


def load_for_inference(folder, which="newest", check=False):
    """The weights in `folder`, for generation: a dict with model, model_config, step and tokenizer_dir.

    which: "newest" or "best". The tensors are memory-mapped, the optimizer's are never read. check: as in load.
    """
    if str(folder).startswith("hf:"):            # a folder that export.py made
        return read_model(folder.removeprefix("hf:"))
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
            state = load(path, check, mmap=True)
            break
        except UserError as error:
            if path == paths[-1]:
                raise
            print(f"{error}; trying the checkpoint before it")
    state["tokenizer_dir"] = os.path.join(folder, "tokenizer")
    return state


def read_settings(folder, *needed):
    """The settings of the run that left `folder`, a dict, from its config.py. Literals only: nothing is executed.

    UserError if it cannot be read, or lacks one of the keys in `needed`.
    """
    path = os.path.join(folder, "config.py")
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        settings = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    except (OSError, SyntaxError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if missing := set(needed) - settings.keys():
        raise UserError(f"{path} says nothing of {', '.join(sorted(missing))}: it is not what train.py wrote")
    return settings


def write_settings(folder, settings):
    """Write the settings of a run to folder/config.py, as a config file that train.py takes."""
    comments, path = field_comments(type(settings)), os.path.join(folder, "config.py")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        for key, value in asdict(settings).items():
            if key not in OF_ONE_CALL:
                file.write(f"{key} = {value!r}  # {comments[key]}\n")
    os.replace(path + ".tmp", path)


def find_tokenizer(meta, folder):
    """The folder of the tokenizer that the data were prepared with: where meta.json says, or the copy in `folder`.

    Raises UserError if neither is that tokenizer, to the byte.
    """
    for source in (meta["tokenizer"], os.path.join(folder, "tokenizer")):
        try:
            with open(os.path.join(source, "tokenizer.json"), "rb") as file:
                if hashlib.sha256(file.read()).hexdigest() == meta["tokenizer_hash"]:
                    return source
        except OSError:
            pass
    raise UserError(f"{meta['tokenizer']}/tokenizer.json is missing, or is not the tokenizer that the data were prepared with: prepare them again")


def copy_tokenizer(source, folder):
    """Put the tokenizer's files into folder/tokenizer."""
    target = os.path.join(folder, "tokenizer")
    if os.path.realpath(source) != os.path.realpath(target):
        os.makedirs(target + ".tmp")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if os.path.exists(os.path.join(source, name)):
                shutil.copy(os.path.join(source, name), target + ".tmp")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(target + ".tmp", target)
