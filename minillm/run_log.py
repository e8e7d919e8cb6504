"""The log of a run: lines in the terminal, records in metrics.jsonl, trackers on request.

A step's numbers are read one step late: reading them at once would be a GPU sync. Only rank 0
writes; every rank counts the non-finite steps. A full disk or a closed pipe (`python train.py |
head`) does not stop the training: records wait in memory until they can be written, lines are lost.
"""
import errno
import json
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from minillm import trackers
from minillm.dataloader import batch_windows
from minillm.device import peak_flops
from minillm.distributed import print0
from minillm.errors import forget_lost_lines


class MetricsFile:
    """metrics.jsonl. Records wait in memory until `open`, and while the disk is full."""

    def __init__(self, path):
        self.path, self.file = path, None
        self.unwritten, self.failed = b"", False

    def open(self, step, keep_validation):
        """Drop what will be written again: the records from `step` on, and half a line.

        keep_validation: `step` itself will not be validated again, so its record stays.
        """
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            # opening a pipe would wait forever for its other end
            raise OSError(errno.EEXIST, "it is not a file", self.path)
        old = []
        if step and os.path.exists(self.path):
            with open(self.path, "rb") as file:
                old = [line for line in file if _stays(line, step, keep_validation)]
        with open(self.path + ".tmp", "wb") as file:
            file.writelines(old)
        os.replace(self.path + ".tmp", self.path)
        self.file = open(self.path, "ab", buffering=0)
        self._write_out()

    def write(self, record):
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record = record | {key: None}    # JSON knows no NaN
        self.unwritten += json.dumps(record).encode() + b"\n"
        if self.file:
            self._write_out()

    def _write_out(self):
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
            self.failed = False
        except OSError as error:
            if not self.failed:
                print0(f"could not write {self.path}: {error.strerror}; its records wait in memory")
            self.failed = True

    def sync(self):
        """Force the records to the disk; a full disk does not stop the training."""
        try:
            os.fsync(self.file.fileno())
        except OSError:
            pass


def _stays(line, step, keep_validation):
    """Does a line of metrics.jsonl stay when its run resumes at `step`?"""
    try:
        record = json.loads(line)
        at = record["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    if not line.endswith(b"\n") or type(at) is not int:
        return False
    return at < step or (at == step and keep_validation and "val_loss" in record)


def _saved_number(resumed, key, default):
    """A number of a checkpoint, or the default where there is none that makes sense."""
    value = resumed.get(key)
    return value if type(value) in (int, float) and 0 <= value < 2**63 else default


def duration(seconds):
    """Seconds in words: 4:05, 3:04:05, 2d 03:04:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{seconds:02}"
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


class RunLog:
    """The log of one run.

    s: the Settings of train.py. facts: of describe_run. resumed: the checkpoint, or None. writes:
    is this rank 0? The clock gives tokens/s since the last line; evaluating and saving restart it,
    so that they don't count.
    """

    def __init__(self, s, model, facts, device, world, resumed, writes):
        resumed = resumed or {}
        self.s, self.writes = s, writes
        self.moe_layers = [layer for layer, _ in model.moe_layers()]
        self.n_loads = sum(moe.n_expert for _, moe in model.moe_layers())
        self.flops = model.flops_per_token(s.block_size)
        self.peak = world * (peak_flops(device) or 0)    # FLOP/s of all devices; 0: unknown
        self.tokens_per_step = facts["tokens_per_step"]
        total, active = model.n_params()
        self.parameters = {"parameters": total, "active_parameters": active}
        self.first_step = resumed.get("step", 0)
        # old checkpoints don't count tokens and seconds
        tokens = self.first_step * self.tokens_per_step
        self.tokens_before = _saved_number(resumed, "tokens", tokens)
        self.seconds_before = _saved_number(resumed, "seconds", 0.0)
        self.bad_in_a_row, self.bad_in_all = resumed.get("bad_steps", [0, 0])
        self.started = time.monotonic()
        self.waiting = self.validated = None
        self.last_step = self.first_step - 1     # the newest step whose numbers are known
        self.has_begun = False
        self.trackers = []
        if not writes:
            return
        self.trackers = trackers.start(s, resumed, facts)
        self.metrics = MetricsFile(os.path.join(s.out_dir, "metrics.jsonl"))
        if not resumed:
            self.write({"step": 0} | self.parameters)
        self.bar = tqdm(total=s.steps, initial=self.first_step, unit="step",
                        disable=not sys.stderr or not sys.stderr.isatty(), dynamic_ncols=True)
        self.starved = torch.zeros(1)
        self.restart_clock(self.first_step)

    def begin(self):
        """Write to out_dir from now on; the records so far have waited."""
        s, step = self.s, self.first_step
        validates_again = s.eval_interval and (step % s.eval_interval == 0 or step >= s.steps)
        self.has_begun = True
        self.metrics.open(step, keep_validation=not validates_again)

    def restart_clock(self, step):
        if self.writes:
            self.clock, self.clock_step = time.perf_counter(), step

    def tokens(self, step):
        """Training tokens of the whole run after `step` steps."""
        return self.tokens_before + (step - self.first_step) * self.tokens_per_step

    def seconds(self):
        """Seconds of the whole run so far, sessions before a resume included."""
        return self.seconds_before + time.monotonic() - self.started

    def state(self, step):
        """What a checkpoint keeps of the log."""
        return {"bad_steps": [self.bad_in_a_row, self.bad_in_all], "tokens": self.tokens(step),
                "seconds": self.seconds(), "trackers": {t.name: t.id for t in self.trackers}}

    def write(self, record):
        self.metrics.write(record)
        values = {key: value for key, value in record.items()
                  if key != "step" and isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(values, record["step"])

    # ---- a step's numbers, read one step late

    def step(self, step, lr, numbers):
        """Take the numbers of a finished step, and log those of the step before it.

        numbers: a tensor on the device: loss, gradient norm, and of an MoE its load-balancing loss
        and the load of every expert in every MoE layer.
        """
        arrived = None
        if numbers.is_cuda:
            # copied now: a later copy would wait behind the whole next step
            numbers, arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self.catch_up()
        self.waiting = step, lr, numbers, arrived
        if arrived is None:
            self.catch_up()                      # not on a GPU: there is no sync to avoid

    def catch_up(self):
        """Log the step whose numbers are waiting, if any; their layout is in train.py."""
        if self.waiting is None:
            return
        step, lr, numbers, arrived = self.waiting
        self.waiting, self.last_step = None, step
        if arrived:
            arrived.synchronize()
        loss, norm, *moe = numbers.tolist()
        known = 1 + self.n_loads if self.moe_layers else 0
        if len(moe) != known:                    # a further number would be taken for an expert's
            raise ValueError(f"train.py gives {len(moe)} numbers after loss and norm, RunLog takes "
                             f"{known}: read a new one here, before *moe")
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.bad_in_all += not finite
        if self.writes:
            self._log_step(step, lr, loss, norm, moe, finite)

    def _log_step(self, step, lr, loss, norm, moe, finite):
        s = self.s
        self.bar.update(1)
        record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm,
                  "skipped": self.bad_in_all}
        if moe:
            record |= self._moe_record(step, moe)
        if step % s.log_interval and step != s.steps - 1 and finite:
            return
        elapsed = max(time.perf_counter() - self.clock, 1e-9)
        rate = (step + 1 - self.clock_step) * self.tokens_per_step / elapsed
        self.restart_clock(step + 1)
        left = (s.steps - step - 1) * self.tokens_per_step / max(rate, 1e-9)
        timed = step > self.first_step or not s.compile      # else most of it was compiling
        record |= {"tokens": self.tokens(step + 1), "tokens_per_s": rate if timed else None,
                   "mfu": rate * self.flops / self.peak if timed and self.peak else None}
        parts = [f"step {step:>6}/{s.steps}", f"loss {loss:.4f}", f"lr {lr:.2e}",
                 f"norm {norm:.2f}"]
        if timed:
            parts.append(f"{rate:,.0f} tok/s")
        if record["mfu"]:
            parts.append(f"MFU {record['mfu']:.1%}")
        if moe:
            parts.append(f"load {record['load_min']:.2f}–{record['load_max']:.2f}")
        if timed:
            parts.append(f"{duration(left)} left")
        if not finite:
            parts.append(f"not finite, update skipped ({self.bad_in_all} so far)")
        print0(" · ".join(parts))
        self.write(record)

    def _moe_record(self, step, moe):
        """How the experts share the work; warns of an expert that is almost unused for long."""
        balance, load = moe[0], torch.tensor(moe[1:]).view(len(self.moe_layers), -1)
        experts = load.shape[1]
        self.starved = (self.starved + 1) * (load < 0.01 / experts)
        for row, expert in (self.starved == 100).nonzero().tolist():
            print0(f"warning: step {step}: expert {expert} of layer {self.moe_layers[row]} has had "
                   "under 1% of its fair share for 100 steps")
        entropy = torch.ones(1)
        if experts > 1:
            entropy = -(load * load.clamp(min=1e-9).log()).sum(1) / math.log(experts)
        return {"balance_loss": balance, "load_min": (load.min() * experts).item(),
                "load_max": (load.max() * experts).item(), "load_entropy": entropy.mean().item(),
                "load": [[round(share, 5) for share in layer] for layer in load.tolist()]}

    def validation(self, step, val_loss):
        self.validated = f"validation loss {val_loss:.4f} at step {step}"
        if self.writes:
            print0(f"step {step:>6}/{self.s.steps} · validation loss {val_loss:.4f}")
            self.write({"step": step, "val_loss": val_loss, "tokens": self.tokens(step)})

    def close(self, step):
        """The closing record and line: tokens and seconds of the whole run."""
        seconds = self.seconds()
        totals = {"seconds": seconds, "tokens": self.tokens(step)}
        self.write({"step": step} | totals | self.parameters)
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()
        done = step >= self.s.steps
        verb = "done" if done else "stopped"
        parts = [f"{verb} at step {step} after {seconds:.0f} s"]
        if self.validated:
            parts.append(self.validated)
        parts.append(self.s.out_dir)
        if not done:
            parts.append("--init_from=resume continues it" if step > 0 else "nothing was written")
        print0(" · ".join(parts))
        forget_lost_lines()


def bad_steps_message(s, log, data):
    """The error message of a run whose loss is no longer finite."""
    global_batch = s.batch_size * s.gradient_accumulation_steps
    windows = batch_windows(s.seed, log.last_step, global_batch, data.n_windows).tolist()
    shown = f"{windows[:8]}{'...' if len(windows) > 8 else ''}"
    return (f"stopped at step {log.last_step}, the last of {log.bad_in_a_row} in a row without a "
            f"finite loss and gradient; its windows: {shown}; the same command with "
            f"--inspect_step={log.last_step} prints them")
