"""A checkpoint file: saved whole or not at all, checked before training trusts it, never executed.

What goes into one is decided by `save` in train.py.

    out_dir/ckpt_00001000.pt   all that resuming after 1000 steps needs (the newest few are kept)
    out_dir/best.pt            the weights of the best validation loss

A checkpoint is what torch.save writes: a zip file, whose checksums reveal a flipped bit. It is read
with weights_only: anything but tensors, numbers, text and containers of these is refused.
"""
import io
import math
import os
import pickle
import re
import struct
import typing
import zipfile

import torch

from minillm.atomic_folder import sync
from minillm.distributed import warn0
from minillm.errors import UserError, brief
from minillm.export_hf import read_model
from minillm.same_function import has_changed
from minillm.tokenizer import Tokenizer

MODEL_KEYS = {"model": dict, "model_config": dict, "step": int, "tokenizer_hash": str}
RESUME_KEYS = {"optimizer": dict, "scaler": dict, "identity": dict, "settings": dict,
               "best_val_loss": float, "bad_steps": list}
# of these keys the value matters too, not only its type
MAKES_SENSE = {
    "step": lambda step: 0 <= step < 10**18,             # as many digits as a file's name has
    "best_val_loss": lambda loss: loss == loss,
    "bad_steps": lambda counts: [type(count) for count in counts] == [int, int],
}
READ_ERRORS = (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, LookupError,
               AttributeError, TypeError, struct.error)


class Damaged(UserError):
    """The file is not whole, or no checkpoint at all; an older one may take its place."""


class _File(io.FileIO):
    """A file that remembers why a write failed: torch's zip writer hides the system's reason."""
    error = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def save(path, state):
    """Write `state` under a temporary name, sync, rename: a crash leaves the old file or the new.

    Raises OSError with the system's reason, for instance a full disk.
    """
    temporary = path + ".tmp"
    try:
        with _File(temporary, "wb") as raw:
            try:
                with io.BufferedWriter(raw, 1 << 20) as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            except RuntimeError:
                if raw.error:
                    raise raw.error from None
                raise
        os.replace(temporary, path)
        sync(os.path.dirname(path))
    except BaseException:
        remove(temporary)
        raise


def remove(path):
    """Remove a file that may not be there."""
    try:
        os.remove(path)
    except FileNotFoundError:
        pass


def step_path(folder, step):
    return os.path.join(folder, f"ckpt_{step:08d}.pt")


def best_path(folder):
    return os.path.join(folder, "best.pt")


def saved_steps(folder):
    """The steps that `folder` has checkpoints of, newest first. UserError if it can't be listed."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    steps = (re.fullmatch(r"ckpt_([0-9]{8,18})\.pt", name) for name in names)
    return sorted((int(match[1]) for match in steps if match), reverse=True)


def load(path, check=True, keys=MODEL_KEYS):
    """The dict in a checkpoint, on the CPU, and its "path".

    The tensors are memory-mapped: several processes share them, and they are read when they are
    used. check=True reads every byte against its checksum first (about 1 s per GB). keys: what it
    must hold, and of which type. Raises Damaged if it is not whole or holds anything but data;
    PermissionError if it can't be opened.
    """
    try:
        if check:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise Damaged(f"{path} is damaged: the checksum of {damaged} does not fit")
        # torch maps only files whose name is UTF-8 on the disk too (in a GBK locale it is not)
        mmap = os.fsencode(path) == str(path).encode("utf-8", "replace")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError:
        raise                                    # says nothing about whether the file is damaged
    except pickle.UnpicklingError as error:
        reason = _first_line(error)
        raise Damaged(f"{path} was refused, it is not a plain checkpoint: {reason}") from None
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise Damaged(f"cannot read checkpoint {path}, it is damaged or cut short: "
                      f"{reason}") from None
    if isinstance(state, dict):
        missing = [key for key, kind in keys.items() if not _fits(key, state.get(key), kind)]
    else:
        missing = keys
    if missing:
        purpose = "start" if keys is MODEL_KEYS else "resume"
        raise Damaged(f"{path} is not a checkpoint to {purpose} from: "
                      f"no {', '.join(missing)} in it")
    state["path"] = str(path)
    return state


def _fits(key, value, kind):
    """Is a value of a checkpoint of the type `kind` (or a subclass), and one that makes sense?"""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return key not in MAKES_SENSE or MAKES_SENSE[key](value)


def _first_line(error):
    line = str(error).split("\n")[0] or type(error).__name__
    return line if len(line) <= 120 else line[:119] + "…"


def best_step(folder):
    """The step of best.pt, or -1 where there is none that can be read."""
    try:
        return load(best_path(folder), check=False)["step"]
    except (UserError, OSError):
        return -1


def load_first(paths, keys=MODEL_KEYS, report=print, **options):
    """load() of the first of `paths` that is whole; the damaged ones before it are reported.

    Raises the last one's Damaged if none is whole, and UserError for a file without permission: the
    user would not expect an older checkpoint in its place.
    """
    for path in paths:
        try:
            return load(path, keys=keys, **options)
        except PermissionError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except Damaged as error:
            if path == paths[-1]:
                raise
            report(f"{error}; using the checkpoint before it")


def paths_of(folder, which="newest"):
    """The files to try for a checkpoint of `folder`: "newest", "best", or a step. Or a .pt file.

    For "newest" these are all of them, newest first; best.pt where it stands alone.
    """
    which = str(which)
    if os.path.isfile(folder):
        if which != "newest":
            raise UserError(f"checkpoint={which} names one of a folder, and {folder} is a file")
        return [folder]
    if not os.path.isdir(folder):
        kind = "file" if str(folder).lower().endswith(".pt") else "folder"
        raise UserError(f"no model in {folder}: there is no such {kind}; train.py makes one")
    steps, best = saved_steps(folder), best_path(folder)
    bests = [best] if os.path.exists(best) else []
    if which == "newest":
        found = [step_path(folder, step) for step in steps] or bests
    elif which == "best":
        found = bests
    elif re.fullmatch("[0-9]{1,18}", which):
        found = [step_path(folder, int(which))] if int(which) in steps else []
    else:
        raise UserError(f"checkpoint={which[:40]!r} must be newest, best or the number of a step")
    if not found:
        there = [str(step) for step in steps] + (["best"] if bests else [])
        hint = f"; there are {', '.join(there)}" if there else "; train.py writes them"
        if not there and os.path.exists(os.path.join(folder, "config.json")):
            hint = f"; it is for transformers, so name it hf:{folder}"
        name = f"checkpoint of step {which}" if which.isdecimal() else f"{which} checkpoint"
        raise UserError(f"no {name} in {folder}{hint}")
    return found


def load_for_inference(folder, which="newest", check=False):
    """The weights in `folder`: a dict with model, model_config, step, tokenizer_dir and path.

    which: as in paths_of. check: as in load, False is quick. The optimizer stays in the file.
    """
    if str(folder).startswith("hf:"):            # a folder that export.py made
        if which != "newest":
            raise UserError(f"checkpoint={which}: {folder} holds only one model")
        return read_model(folder.removeprefix("hf:")) | {"path": folder}
    paths = paths_of(folder, which)
    state = load_first(paths, report=warn0, check=check)
    state["tokenizer_dir"] = os.path.join(os.path.dirname(paths[0]), "tokenizer")
    return state


def model_config(state, kind):
    """`kind` (the dataclass GPTConfig) filled with a checkpoint's model_config.

    Raises UserError that names the file and the key, where a key is unknown or of another type.
    """
    types = typing.get_type_hints(kind)
    config = dict(state["model_config"])
    for key, value in config.items():
        if key not in types:
            raise UserError(f"{state['path']}: model_config has an unknown key {key!r}: "
                            "open it with the code that wrote it")
        if type(value) is int and value.bit_length() > 40:
            raise UserError(f"{state['path']}: model_config has {key}={brief(value)}, "
                            "which is too large")
        if type(value) is float and not math.isfinite(value):
            raise UserError(f"{state['path']}: model_config has {key}={value}, "
                            "which is no finite number")
        if type(value) is int and types[key] is float:
            config[key] = float(value)
        # a field that somebody adds may have a Literal or `int | None`, which is not a class
        elif isinstance(types[key], type) and type(value) is not types[key]:
            raise UserError(f"{state['path']}: model_config has {key}={brief(value)}, "
                            f"which is not of type {types[key].__name__}")
    if config.get("n_layer", 0) > len(state["model"]):
        raise UserError(f"{state['path']}: model_config has n_layer={config['n_layer']}, "
                        f"but the file holds only {len(state['model'])} tensors")
    try:
        shape = kind(**config)
    except UserError as error:
        raise UserError(f"{state['path']}: model_config: {error}") from None
    if shape.rope_theta < 1:
        raise UserError(f"{state['path']}: model_config has rope_theta={shape.rope_theta}, "
                        "which must be at least 1")
    # checked first, because a model of a wrong width could take all memory
    _check_tensor(state, "wte.weight", (shape.vocab_size, shape.n_embd))
    return shape


class skip_init(torch.overrides.TorchFunctionMode):
    """with skip_init(): a new model's weights are not drawn, so their memory is never touched.

    Not the meta device: its first operation imports sympy and torch._dynamo, which takes 0.8 s.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def load_weights(model, state, assign=False):
    """Copy a checkpoint's weights into `model`; assign=True: make them its own, without a copy.

    Raises UserError that names the file and what doesn't fit; a line on stderr says where the code
    has changed since.
    """
    weights, wanted = state["model"], model.state_dict()
    for name, tensor in wanted.items():
        _check_tensor(state, name, tuple(tensor.shape), tensor.is_floating_point())
    if unknown := [str(name) for name in weights if name not in wanted]:
        _refuse(state, f"{unknown[0]} is unknown")
    model.load_state_dict(weights, assign=assign)
    if has_changed(model, state.get("fingerprint")):
        warn0(f"{state['path']}: model.py (or what it imports) has changed since this was trained: "
              "the same weights now give other answers")


def _check_tensor(state, name, shape, floating=True):
    """Raise UserError unless a checkpoint's weights hold a tensor of this name, shape and kind."""
    found = state["model"].get(name)
    if not isinstance(found, torch.Tensor):
        _refuse(state, f"{name} is missing")
    if found.layout != torch.strided or found.is_meta:
        _refuse(state, f"{name} holds no plain numbers")
    if found.shape != shape or found.is_floating_point() != floating:
        _refuse(state, f"{name} is {found.dtype} of shape {tuple(found.shape)}, not {shape}")


def _refuse(state, why):
    raise UserError(f"the weights in {state['path']} do not fit its own model_config: {why} "
                    "(is model.py the one that trained it?)")


def load_tokenizer(state, folder, vocab_size):
    """The tokenizer in `folder`, beside the checkpoint `state` of a model with `vocab_size` ids.

    Raises UserError unless the model was trained with it.
    """
    tokenizer = Tokenizer.load(state["tokenizer_dir"])
    if tokenizer.hash != state["tokenizer_hash"]:
        raise UserError(f"{state['tokenizer_dir']} is not the tokenizer that the model in {folder} "
                        "was trained with")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, "
                        f"its model {vocab_size}")
    return tokenizer
