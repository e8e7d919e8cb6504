"""Where a run starts: at fresh weights, at another run's weights, or at a checkpoint of its own.

Whatever does not fit together (shape, tokenizer, data, order of the data) is refused with one line that
names the difference.
"""
import os
import socket
from dataclasses import asdict, fields

import torch

from minillm import checkpoint
from minillm.errors import UserError
from minillm.dataloader import derive_seed, fingerprint
from model import GPT, GPTConfig
from minillm.run_log import say


def build_model(s, data, start):
    """The model, on the CPU, with the weights of the checkpoint `start` if there is one. UserError where the two do not fit."""
    shape = {f.name: getattr(s, f.name) for f in fields(GPTConfig)}
    shape["vocab_size"] = s.vocab_size or data.meta["vocab_size"]
    if start:
        if start["tokenizer_hash"] != data.meta["tokenizer_hash"]:
            raise UserError(f"the checkpoint was trained with tokenizer {start['tokenizer_hash'][:12]}, {s.data_dir} was prepared with "
                            f"{data.meta['tokenizer_hash'][:12]}: prepare the data with the checkpoint's tokenizer")
        # RoPE has no weights, so a model may go on with another context length; dropout is a matter of training
        old = start["model_config"] | {"block_size": s.block_size, "dropout": s.dropout}
        for key in s.given & old.keys():
            if getattr(s, key) != old[key] and not (key in ("n_inner", "vocab_size") and getattr(s, key) == 0):
                raise UserError(f"the checkpoint has {key}={old[key]}, these settings say {getattr(s, key)}: leave {key} out, or start from scratch")
        shape = old
    try:
        config = GPTConfig(**shape)
    except TypeError as error:
        raise UserError(f"the checkpoint's model_config is of another program: {error}") from None
    if config.vocab_size < data.meta["vocab_size"]:
        raise UserError(f"vocab_size={config.vocab_size} is smaller than the tokenizer's {data.meta['vocab_size']}")
    torch.manual_seed(derive_seed(s.seed, "weights"))
    model = GPT(config)
    if start:
        checkpoint.load_weights(model, start["model"])
    return model


def identity(s, data):
    """What must not change between a checkpoint and its resumption: the data, and their order."""
    return {"data": fingerprint(data.meta), "seed": s.seed, "block_size": s.block_size,
            "windows in a step": s.batch_size * s.gradient_accumulation_steps}


def job():
    """A name for this launch of torchrun, the same after each of its restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


def open_resumed(s, data):
    """The newest whole checkpoint of out_dir, or None to start anew."""
    steps = checkpoint.saved_steps(s.out_dir)
    # torchrun --max-restarts starts the same command again: that time it must go on with what this job saved
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    resumed = checkpoint.load_newest(s.out_dir, say) if s.init_from == "resume" or restarted and steps else None
    if s.init_from != "resume" and (resumed is None or resumed["settings"].get("job") != job()):
        if steps and not s.overwrite:
            raise UserError(f"{s.out_dir} already holds a run at step {steps[0]}: "
                            "--init_from=resume goes on with it, --overwrite=True starts over")
        return None
    for key, value in identity(s, data).items():
        if resumed["identity"].get(key) != value and not s.allow_other_data:
            raise UserError(f"the checkpoint in {s.out_dir} was trained with {key} {resumed['identity'].get(key)}, now it is {value}; "
                            "--allow_other_data=True goes on all the same")
    changed = [f"{key} {old!r} → {asdict(s)[key]!r}" for key, old in resumed["settings"].items()
               if asdict(s).get(key, old) != old and key not in ("init_from", "overwrite", "data_dir", "out_dir")]
    if changed:
        say(f"changed since the checkpoint: {', '.join(changed)}")
    return resumed
