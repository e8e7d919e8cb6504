"""What a run tells of itself: lines in the terminal, records in metrics.jsonl, Weights & Biases on request.

Rank 0 alone tells. A full disk or a reader that has gone (`python train.py | head`) stops no training:
records wait in memory until they can be written, lines are lost.
"""
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

from minillm.errors import UserError
from minillm.distributed import rank_and_world


def say(text):
    """Print a line, above the progress bar."""
    if rank_and_world()[0] > 0:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError:                              # the disk with the log is full
        pass


class MetricsFile:
    """metrics.jsonl. On resuming, records from `step` on are dropped: they will be written again."""

    def __init__(self, path, step):
        old = []
        if step and os.path.exists(path):
            with open(path, "rb") as file:
                old = [line for line in file if _step_of(line) < step]
        with open(path + ".tmp", "wb") as file:
            file.writelines(old)
        os.replace(path + ".tmp", path)
        self.file, self.unwritten, self.failed = open(path, "ab", buffering=0), b"", False

    def write(self, record):
        # JSON knows no NaN
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        self.unwritten += json.dumps(record).encode() + b"\n"
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
            self.failed = False
        except OSError as error:
            if not self.failed:
                say(f"could not write {self.file.name}: {error.strerror}; its records wait in memory")
            self.failed = True

    def sync(self):
        os.fsync(self.file.fileno())


def _step_of(line):
    """The step of a line of metrics.jsonl; infinite for half a line."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_wandb(s):
    if s.wandb_log and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb_log=True needs the package wandb: pip install wandb")


class RunLog:
    """The log of one run. s: the Settings of train.py; peak: FLOP/s of all its devices, or None where unknown.

    The clock gives tokens/s since the last line; evaluating and saving restart it, so that they don't count.
    """

    def __init__(self, s, model, tokens_per_step, peak, first_step, wandb_id):
        self.s, self.config, self.tokens_per_step, self.peak = s, model.config, tokens_per_step, peak
        self.flops = model.flops_per_token(s.block_size)
        self.metrics = MetricsFile(os.path.join(s.out_dir, "metrics.jsonl"), first_step)
        self.wandb = None
        if s.wandb_log:
            import wandb
            self.wandb = wandb.init(project=s.wandb_project, name=s.wandb_run_name or s.out_dir, id=wandb_id, resume="allow", config=asdict(s))
        self.wandb_id = self.wandb and self.wandb.id
        self.bar = tqdm(total=s.max_iters, initial=first_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.starved = torch.zeros(1)
        self.restart_clock(first_step)

    def restart_clock(self, step):
        self.clock, self.clock_step = time.perf_counter(), step

    def write(self, record):
        self.metrics.write(record)
        if self.wandb:
            self.wandb.log({key: value for key, value in record.items() if key not in ("step", "load")}, step=record["step"])

    def step(self, step, lr, loss, norm, moe, skipped):
        """A finished step. moe: [balance loss, share of rows per layer and expert ...] or []; skipped: updates skipped so far."""
        self.bar.update(1)
        record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "skipped": skipped}
        if moe:
            record |= self.moe_record(step, moe)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if step % self.s.log_interval and step != self.s.max_iters - 1 and finite:
            return
        rate = (step + 1 - self.clock_step) * self.tokens_per_step / max(time.perf_counter() - self.clock, 1e-9)
        self.restart_clock(step + 1)
        record |= {"tokens_per_s": rate, "mfu": rate * self.flops / self.peak if self.peak else None}
        left = int((self.s.max_iters - step - 1) * self.tokens_per_step / max(rate, 1e-9))
        say(f"step {step:>6}/{self.s.max_iters} · loss {loss:.4f} · lr {lr:.2e} · norm {norm:.2f} · {rate:,.0f} tok/s"
            + (f" · MFU {record['mfu']:.1%}" if self.peak else "")
            + (f" · load {record['load_min']:.2f}–{record['load_max']:.2f}" if moe else "")
            + f" · {left // 60}:{left % 60:02d} left" + ("" if finite else f" · not finite, update skipped ({skipped} so far)"))
        self.write(record)

    def moe_record(self, step, moe):
        """How the experts share the work; warns of one that has had next to none for long."""
        balance, load = moe[0], torch.tensor(moe[1:]).view(self.config.n_layer, -1)
        fair = 1 / load.shape[1]
        self.starved = (self.starved + 1) * (load < 0.01 * fair)
        for layer, expert in (self.starved == 100).nonzero().tolist():
            say(f"warning: step {step}: expert {expert} of layer {layer} has had under 1 % of its fair share for 100 steps")
        entropy = -(load * load.clamp(min=1e-9).log()).sum(1) / math.log(load.shape[1]) if load.shape[1] > 1 else torch.ones(1)
        return {"balance_loss": balance, "load_min": (load.min() / fair).item(), "load_max": (load.max() / fair).item(),
                "load_entropy": entropy.mean().item(), "load": [[round(x, 5) for x in row] for row in load.tolist()]}

    def validation(self, step, val_loss):
        say(f"step {step:>6}/{self.s.max_iters} · validation loss {val_loss:.4f}")
        self.write({"step": step, "val_loss": val_loss})
