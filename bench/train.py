"""Speed of a training step, beside the limits that this machine sets in the same run.

    python -m bench.train                              # the 171M model (needs a GPU)
    python -m bench.train --n_expert=8                 # the 876M MoE
    python -m bench.train --data_dir=data/pretrain     # from token files too: does the GPU wait?
    python -m bench.train --device=cpu                 # the demo's model on this CPU

A step is forward, backward, clipping and the optimizer, on random tokens. Times are medians after
warm-up. FLOPs per token: 6 × active matmul parameters (the tied head once), and attention's
6 · n_layer · T · n_embd.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import itertools
import statistics
from dataclasses import dataclass
from typing import Literal

import torch

from bench.measure import (ModelShape, copy_ceiling, make_model, matmul_ceiling, median_time,
                           print_headline, print_profile, seconds_of)
from minillm.activation_checkpointing import checkpoint_blocks
from minillm.attention import document_mask
from minillm.configurator import NonNegative, Positive, configure, whole
from minillm.dataloader import TokenData, batch_windows
from minillm.device import autocast, peak_flops, pick_device, pick_dtype, prepare, to_device
from minillm.errors import UserError, run
from minillm.optimizer import make_optimizer
from minillm.speed.fast_versions import use_float8
from train import Settings as TrainingSettings
from train import make_step_model

# on a CPU, where nobody trains 171M parameters
DEMO = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=192, vocab_size=1200, block_size=128)


@dataclass
class Settings(ModelShape):
    # the batch
    batch_size: NonNegative = 0       # rows; 0: 64, or 16 on a CPU
    block_size: Positive = 512        # tokens in a row
    doc_mask: bool = False            # attention inside documents, as in SFT
    optimizer: Literal["muon", "adamw"] = "muon"    # muon: of the blocks, AdamW for the rest
    data_dir: str = ""                # train on these token files too, in turns with random tokens
    # the measurement
    repeats: whole(2) = 20            # timed steps
    profile: bool = False             # print where the GPU's time goes
    # the machine
    device: str = "auto"              # auto, cpu, cuda
    dtype: str = "auto"               # auto, float32, bfloat16
    compile: bool = True              # torch.compile
    fp8: bool = False                 # matmuls of the blocks in 8 bits
    activation_checkpointing: bool = False   # compute the blocks again in the backward pass


def random_batches(s, device):
    """x, y on the device: the same four over and over."""
    batches = []
    for _ in range(4):
        tokens = torch.randint(1, s.vocab_size, (s.batch_size, s.block_size + 1), device=device)
        if s.doc_mask:                # documents of 100 tokens on average
            tokens[torch.rand(tokens.shape, device=device) < 1 / 100] = 0
        batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return itertools.cycle(batches)


def file_batches(s, device):
    """x, y of train.bin in the order in which train.py reads them, on their way to the device."""
    data = TokenData(s.data_dir, "train", s.block_size)
    vocab_size = data.meta["vocab_size"]
    if vocab_size > s.vocab_size:
        raise UserError(f"{s.data_dir} has {vocab_size:,} tokens: give --vocab_size={vocab_size}")
    return read_batches(s, data, device)


def read_batches(s, data, device):
    for step in itertools.count():
        windows = batch_windows(0, step, s.batch_size, data.n_windows)
        yield to_device(data.windows(windows), device)


def training_step(s, model, device, dtype, parallel=None, shard=False):
    """A function that makes one full step of a batch (x, y), as train.py does.

    The host runs one step ahead of the device. parallel: wraps the model on several processes.
    """
    settings = TrainingSettings(optimizer=s.optimizer)
    if s.activation_checkpointing:
        checkpoint_blocks(model)
    optimizer = make_optimizer(model, settings, s.compile and device.type == "cuda", shard)
    optimizer.set_rate(1e-4)
    step_model = make_step_model(model, device, s.compile, parallel)
    flex = s.compile and device.type == "cuda"
    ends = []

    def step(batch):
        x, y = batch
        mask = document_mask(x, flex=flex) if s.doc_mask else None
        with autocast(device, dtype):
            loss, moe_stats = step_model(x, y, mask)
        objective = loss / y.numel()
        if moe_stats:
            objective = objective + 0.05 * moe_stats[0]
        objective.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.set_clipping(norm, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            ends.append(torch.cuda.Event())
            ends[-1].record()
            if len(ends) > 1:
                ends.pop(0).synchronize()
    return step


def main():
    # 1) what is measured, and where
    s = configure(Settings)
    device = pick_device(s.device)
    prepare(device, deterministic=False)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        for key, value in DEMO.items():
            if key not in s.given:
                setattr(s, key, value)
    dtype = pick_dtype(s.dtype, device)
    s.batch_size = s.batch_size or (64 if on_gpu else 16)
    random = random_batches(s, device)
    files = file_batches(s, device) if s.data_dir else None
    matmul = matmul_ceiling(device, torch.bfloat16 if on_gpu else dtype)
    copy = copy_ceiling(device)
    model = make_model(s, s.block_size, device).use_fast(s.compile)
    if s.fp8:
        use_float8(model, device, dtype, s.batch_size * s.block_size)
    step = training_step(s, model, device, dtype)
    print_headline(model, device, f"{s.batch_size} × {s.block_size}", str(dtype),
                   f"compile={s.compile}", f"doc_mask={s.doc_mask}", f"fp8={s.fp8}")
    print(f"ceiling       {matmul / 1e12:8.1f} TFLOP/s matmul   {copy / 1e12:6.2f} TB/s copy")

    # 2) the first step, then the others
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first = seconds_of(lambda: step(next(files or random)), device)
    print(f"first step    {first:8.1f} s")
    if on_gpu:
        peak_of_first = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = median_time(lambda: step(next(random)), s.repeats, device)

    # 3) the figures
    tokens = s.batch_size * s.block_size
    flops = model.flops_per_token(s.block_size) * tokens / seconds
    print(f"step          {seconds * 1e3:8.2f} ms")
    print(f"tokens/s      {tokens / seconds:8,.0f}")
    peak = peak_flops(device)
    of_peak = f"   {flops / peak:.1%} of the data sheet's peak" if peak else ""
    print(f"TFLOP/s       {flops / 1e12:8.1f}   {flops / matmul:.1%} of the ceiling{of_peak}")
    if files:
        print_files(s, step, files, random, device)
    if on_gpu:
        peak_memory = torch.cuda.max_memory_allocated()
        print(f"peak memory   {peak_memory / 2**30:8.1f} GiB   "
              f"{peak_of_first / 2**30:.1f} in the first step, when a compiler tries its kernels")
    if on_gpu and s.profile:
        print_profile(lambda: [step(next(random)) for _ in range(3)], 3, "ms per step")


def print_files(s, step, files, random, device):
    """Time steps on token files and on random tokens in turns."""
    read, drawn = [], []
    for _ in range(3):
        read.append(median_time(lambda: step(next(files)), s.repeats, device))
        drawn.append(median_time(lambda: step(next(random)), s.repeats, device))
    read, drawn = statistics.median(read), statistics.median(drawn)
    print(f"from files    {read * 1e3:8.2f} ms per step, random tokens in turns with it "
          f"{drawn * 1e3:.2f} ms: {read / drawn - 1:+.1%}")


if __name__ == "__main__":
    run(main)
