"""Which batch sizes fit a card: the peak memory of training, for a dense model, an MoE and SFT.

    python -m bench.memory                                    # the table; one GPU of 80 GB or more
    python -m bench.memory --model=moe --batch_size=8 --card=24          # one entry, tried
    python -m bench.memory --model=moe --batch_size=8 --card=24 --world=8 --shard=True

The models are those of config/. Memory is a straight line over the batch size, measured at two
sizes; then what the line says of a card is tried in a process that may not take more than the card
has, less 1 GiB for the driver. With --world=8 the process computes as rank 0 of eight and its
messages go nowhere, so the memory is right and the numbers are not.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from bench.measure import make_model
from bench.train import DEMO, random_batches, training_step
from bench.train import Settings as StepSettings
from minillm.configurator import NonNegative, NonNegativeFloat, Positive, configure
from minillm.device import pick_device, pick_dtype
from minillm.distributed import data_parallel
from minillm.errors import UserError, run

MODELS = {"dense": {}, "moe": {"n_expert": 8}, "sft": {"doc_mask": True}}
SIZES = (1, 2, 4, 8, 16, 32, 64)
MEASURED = (16, 32)
CARDS = (8, 12, 16, 24, 48)
DRIVER = 1.0                          # GiB of a card that PyTorch cannot have
MARGIN = 1.02                         # of a card: what is predicted to need so much is tried, too


@dataclass
class Settings:
    # what is measured
    model: Literal["all", "dense", "moe", "sft"] = "all"    # as in config/
    batch_size: NonNegative = 0       # sequences; 0: the table
    activation_checkpointing: bool = False   # blocks computed again in the backward pass
    card: NonNegativeFloat = 0.0      # GiB that the process is held to; 0: all that the GPU has
    world: Positive = 1               # as rank 0 of so many processes
    shard: bool = False               # AdamW's state in shares, too
    # the measurement
    seconds: Positive = 420           # no entry of the table is tried later than that
    device: str = "auto"              # auto, cuda; cpu: tiny models, to try the program
    compile: bool = True              # torch.compile


# ---- one entry, in a process of its own

def pretend_world(world):
    """Be rank 0 of `world` processes whose messages go nowhere."""
    # late: it is torch's own means of testing
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)


def pretended_parallel(model):
    """data_parallel, whose gradients arrive at once, unchanged."""
    def arrive(state, bucket):
        gradients = bucket.buffer()
        devices = [gradients.device] if gradients.is_cuda else None
        future = torch.futures.Future(devices=devices)
        future.set_result(gradients)
        return future
    return data_parallel(model, exchange=arrive)


def peak_gib(s):
    """The peak memory, in GiB, of three training steps; on a CPU the process's own."""
    device = pick_device(s.device)
    if device.type == "cuda" and s.card:
        total = torch.cuda.get_device_properties(device).total_memory
        share = (s.card - DRIVER) * 2**30 / total
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    if s.world > 1:
        pretend_world(s.world)
    sizes = DEMO if device.type == "cpu" else {}
    shape = StepSettings(**sizes | MODELS[s.model], batch_size=s.batch_size, compile=s.compile)
    shape.activation_checkpointing = s.activation_checkpointing
    batches = random_batches(shape, device)
    model = make_model(shape, shape.block_size, device).use_fast(s.compile)
    parallel = pretended_parallel if s.world > 1 else None
    shard = s.shard and s.world > 1
    step = training_step(shape, model, device, pick_dtype("auto", device), parallel, shard)
    for _ in range(3):
        step(next(batches))
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30
    # late: Windows lacks it
    from resource import RUSAGE_SELF, getrusage
    return getrusage(RUSAGE_SELF).ru_maxrss / 2**20


def try_entry(s, model, checkpointed, batch_size, card):
    """peak_gib in a new process: a number, or None where the memory is not enough."""
    command = [sys.executable, "-m", "bench.memory", f"--model={model}", f"--card={card}",
               f"--batch_size={batch_size}", f"--activation_checkpointing={checkpointed}",
               f"--world={s.world}", f"--shard={s.shard}", f"--device={s.device}",
               f"--compile={s.compile}"]
    print("trying", *command[3:7], file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return float(done.stdout.split()[-2])
    if "out of memory" in done.stderr:
        return None
    raise UserError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-300:]}")


# ---- a row of the table

@dataclass
class Row:
    model: str
    checkpointed: bool
    base: float = 0.0                 # GiB at batch size 0
    slope: float = 0.0                # GiB per sequence

    def predict(self, batch_size):
        return self.base + self.slope * batch_size


def fill_row(row, attempt, in_time):
    """The entries of a row: {card: (largest batch size or 0, was it tried?)}.

    attempt(model, checkpointed, batch_size, card): the peak in GiB, or None. in_time(): may it
    still be called?
    """
    def attempted(batch_size, card):
        return attempt(row.model, row.checkpointed, batch_size, card)
    small, large = (attempted(size, 0) for size in MEASURED)
    if large is None or small is None:
        raise UserError(f"{row.model} with --batch_size={MEASURED[1]} does not fit this GPU: the "
                        "table needs a larger one; give --batch_size to try an entry")
    row.slope = (large - small) / (MEASURED[1] - MEASURED[0])
    row.base = small - row.slope * MEASURED[0]
    entries, fits, tried = {}, 0, True           # what fits a smaller card fits the next one
    for card in CARDS:
        room = MARGIN * (card - DRIVER)
        candidates = [size for size in SIZES if size > fits and row.predict(size) <= room]
        for size in reversed(candidates):
            late = not in_time()
            if late or attempted(size, card) is not None:
                fits, tried = size, not late
                break
        entries[card] = fits, tried
    return entries


def print_table(rows, results):
    print("largest batch_size, 512 tokens each; ~: predicted, not tried\n")
    print("| | " + " | ".join(f"{card} GB" for card in CARDS) + " | GiB |")
    print("|---" * (len(CARDS) + 2) + "|")
    for row, entries in zip(rows, results):
        cells = []
        for fits, tried in entries.values():
            cell = str(fits) if fits else "–"
            cells.append(cell if tried else "~" + cell)
        name = row.model
        if row.checkpointed:
            name += ", activation checkpointing"
        line = f"{row.base:.2f} + {row.slope:.3f} × batch_size"
        print(f"| {name} | " + " | ".join(cells) + f" | {line} |")


def main():
    s = configure(Settings)
    if pick_device(s.device).type != "cuda" and "device" not in s.given:
        raise UserError("this needs a GPU; --device=cpu measures tiny models, to try the program")
    if s.batch_size:
        if s.model == "all":
            raise UserError("--batch_size needs --model=dense, moe or sft")
        print(f"peak {peak_gib(s):.3f} GiB")
        return
    started = time.monotonic()

    def in_time():
        return time.monotonic() - started < s.seconds

    def attempt(*entry):
        return try_entry(s, *entry)
    models = MODELS if s.model == "all" else [s.model]
    rows = [Row(model, checkpointed) for model in models for checkpointed in (False, True)]
    # rows at the same time: most of it is compiling, which takes no memory of the GPU
    with ThreadPoolExecutor(len(rows)) as pool:
        results = list(pool.map(lambda row: fill_row(row, attempt, in_time), rows))
    print_table(rows, results)


if __name__ == "__main__":
    run(main)
