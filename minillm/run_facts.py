"""What a run says of itself before its first step, and what of that a user may not have meant."""
import math

from minillm.device import describe
from minillm.distributed import print0
from minillm.report import counted

FEW_STEPS = 1000


def describe_run(s, model, data, device, dtype, world, first_step):
    """Print what will be trained, where and for how long. Returns the facts as a dict."""
    total, active = model.n_params()
    global_batch = s.batch_size * s.gradient_accumulation_steps
    epochs = s.steps * global_batch / data.n_windows
    number_type = str(dtype).removeprefix("torch.") + (" and float8" if s.fp8 else "")
    size = f"{total:,} parameters"
    if active != total:
        size += f", {active:,} active per token"
    processes = "1 process" if world == 1 else f"{world} processes"
    print0(f"{describe(device)}, {number_type}, {processes} · {size}")
    if s.shard and world == 1:
        print0("shard=True changes nothing with one process: it keeps all of the optimizer's state")
    resuming = f" · resuming at step {first_step}" if first_step else ""
    if first_step > s.steps:
        resuming += ", which is beyond them: nothing is left to train"
    print0(f"{s.data_dir}: {len(data.tokens):,} tokens, {counted(data.n_windows, 'windows')} · "
           f"{counted(s.steps, 'steps')} of {counted(global_batch, 'windows')}, "
           f"{epochs:.2f} epochs{resuming}")
    if s.warmup_iters > s.steps:
        print0(f"warmup_iters={s.warmup_iters} is more than these steps: the learning rate stays "
               f"under {s.learning_rate:g}")
    if not (resuming or s.max_iters) and s.steps < FEW_STEPS:    # epochs alone decide
        advise_smaller_steps(s, data, world)
    if s.min_lr > s.learning_rate:
        print0(f"min_lr={s.min_lr:g} is above learning_rate={s.learning_rate:g}: it rises to that")
    return {"steps": s.steps, "epochs_of_data": round(epochs, 4), "parameters": total,
            "active_parameters": active, "tokens_per_step": global_batch * s.block_size,
            "device_name": describe(device), "number_type": number_type, "processes": world}


def report_left_behind(s, start):
    """Say which settings of a checkpoint's model the run does not take over, if none was given."""
    for key in ("block_size", "dropout"):
        old, now = start["model_config"].get(key, getattr(s, key)), getattr(s, key)
        if old != now and key not in s.given:
            print0(f"{key}={now} from here on; the checkpoint had {old}: --{key}={old} keeps it")


def advise_smaller_steps(s, data, world):
    """Where the data are few steps of several micro-steps, say which settings make more of them."""
    # 1,200 steps of 32,768 tokens end at 1.21 bits per byte, 220 of 262,144 at 1.36 (LOG.md)
    fewer = max(world, s.gradient_accumulation_steps * s.steps // FEW_STEPS // world * world)
    if fewer >= s.gradient_accumulation_steps:
        return
    steps = math.ceil(s.epochs * data.n_windows / (s.batch_size * fewer))
    flags = f"--gradient_accumulation_steps={fewer}"
    if s.warmup_iters > steps // 10:
        flags += f" --warmup_iters={max(1, steps // 30)}"
    print0(f"few steps: {flags} makes {steps:,} smaller ones, which learn more")
