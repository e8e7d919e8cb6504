"""Train a model on token files: pretraining or SFT, dense or MoE, on one device or many.

    python train.py                                        # the demo's pretraining, on a laptop
    python train.py config/demo_sft.py                     # then its SFT
    python train.py config/pretrain.py --batch_size=32     # 171M parameters, one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/moe_sft.py
    python train.py config/pretrain.py --init_from=resume  # resume after a crash or Ctrl-C

Guarantees: the batch and the randomness of step s depend only on the seed, s and the batch sizes.
The loss of a step is the mean over the supervised tokens of the global batch, however it is cut
into micro-steps and processes. A run that is killed and resumed is bit-identical to an
uninterrupted one (same machine and settings; on a GPU with --deterministic=True). A step with a
non-finite loss or gradient changes nothing. After Ctrl-C, SIGTERM or a closed terminal the run
finishes its step, saves and exits with status 0; a second Ctrl-C ends it at once.

A log line: step 100/1500 · loss (nats per supervised token, before the update) · lr · norm (of the
gradient, before clipping) · tokens per second · MFU (share of the GPU's peak FLOP/s) · load (MoE:
tokens of the least and the most loaded expert, 1.00 is a fair share) · time left.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from minillm import checkpoint, run_facts, run_folder, run_tokenizer, trackers
from minillm.activation_checkpointing import checkpoint_blocks
from minillm.attention import document_mask
from minillm.configurator import (BelowOne, Fraction, NonNegative, NonNegativeFloat, Positive,
                                  configure, number, whole)
from minillm.dataloader import TokenData, batch_windows, derive_seed, rank_batches, show_windows
from minillm.device import (autocast, compile_for_training, pick_device, pick_dtype, prepare,
                            to_device)
from minillm.distributed import data_parallel, join, launch_id, rank_and_world, sum_over_ranks
from minillm.errors import UserError, run
from minillm.init import init_for_muon, redraw_collapsed_rows
from minillm.interrupt import StopSignal
from minillm.optimizer import make_optimizer
from minillm.run_log import RunLog, bad_steps_message
from minillm.same_function import check_attention, check_loss, fingerprint, noisy_in_training
from minillm.tokenizer import Tokenizer
from minillm.validation import validation_loss
from model import GPT, GPTConfig, fast_versions


@dataclass
class Settings:
    # files
    out_dir: str = "out/demo_pretrain"      # checkpoints, tokenizer, config and metrics go here
    data_dir: str = "data/demo/pretrain"    # what prepare_pretrain.py or prepare_sft.py wrote
    init_from: str = "scratch"              # scratch, resume (out_dir's run), DIR, FILE.pt, hf:DIR
    checkpoint: str = "newest"              # which one init_from loads: newest, best or a step
    tokenizer: str = ""                     # its folder; empty: the one data_dir was made with
    overwrite: bool = False                 # start over in an out_dir that already holds a run
    # the model; init_from keeps the checkpoint's shape, apart from block_size and dropout
    n_layer: whole(1, 10**4) = 2            # blocks
    n_head: Positive = 4                    # query heads
    n_kv_head: Positive = 2                 # key/value heads, shared by groups of query heads
    n_embd: whole(1, 10**7) = 192           # width of the residual stream
    n_inner: whole(0, 10**8) = 0            # width of the FFN or of one expert; 0: 4 * n_embd
    n_expert: NonNegative = 0               # experts per layer; 0: a dense model
    n_expert_per_tok: Positive = 4          # experts that each token visits
    block_size: whole(1, 10**8) = 128       # tokens per sequence (window): the context length
    vocab_size: whole(0, 10**7) = 0         # rows of the embedding; 0: the tokenizer's vocabulary
    rope_theta: number(1) = 10000.0         # base of the RoPE frequencies
    dropout: float = 0.0                    # on the embedding and after each sub-layer
    bias: bool = False                      # biases in the linear layers
    # windows of a step: batch_size * gradient_accumulation_steps, shared by all processes
    batch_size: whole(1, 10**7) = 16        # sequences (windows) of a micro-step
    gradient_accumulation_steps: whole(1, 10**7) = 1 # micro-steps of a step, over all processes
    doc_mask: bool | None = None            # no attention across documents; auto: True for SFT data
    seed: int = 1337                        # of weights, data order, dropout and router noise
    # the optimizer and its learning rate: linear warm-up, then the schedule
    optimizer: Literal["muon", "adamw"] = "muon"   # muon: AdamW for all but the blocks' matrices
    max_iters: NonNegative = 600            # number of steps; 0: as many as epochs makes
    epochs: NonNegativeFloat = 0.0          # passes over the data; 0: no limit. The shorter wins
    learning_rate: NonNegativeFloat = 0.04  # peak learning rate, reached after the warm-up
    min_lr: NonNegativeFloat = 0.0          # learning rate at the end of the schedule
    warmup_iters: NonNegative = 20          # steps of linear warm-up
    schedule: Literal["cosine", "linear", "constant"] = "linear" # linear: constant, then falling
    decay_share: Fraction = 1.0             # linear: the last share of the steps, where it falls
    lr_decay_iters: NonNegative = 0         # step at which min_lr is reached; 0: the last one
    decay_lr: bool = True                   # False: the same as --schedule=constant
    embedding_rate: NonNegativeFloat = 1.67 # muon: the embedding's rate = learning_rate * this
    vector_rate: NonNegativeFloat = 0.067   # muon: likewise for norms, biases and routers
    weight_decay: NonNegativeFloat = 0.1    # on matrices; never on norms and biases
    beta1: BelowOne = 0.7                   # of AdamW: its momentum. Muon's is 0.9, without a flag
    beta2: BelowOne = 0.95                  # of AdamW: decay of the mean squared gradient
    grad_clip: NonNegativeFloat = 1.0       # scale larger gradients down to this norm; 0: never
    aux_loss_weight: NonNegativeFloat = 0.05    # weight of the load-balancing loss of an MoE
    # watching and saving
    log_interval: Positive = 50             # steps between log lines and records in metrics.jsonl
    eval_interval: NonNegative = 300        # steps between validations; 0: none
    eval_iters: Positive = 50               # validation batches of batch_size sequences
    checkpoint_interval: NonNegative = 500  # steps between checkpoints; 0: only at the end
    keep_checkpoints: Positive = 2          # how many of the newest to keep
    keep_every: NonNegative = 0             # also keep checkpoints at multiples of this; 0: none
    save_best: bool = True                  # also keep the weights of the best validation loss
    max_bad_steps: Positive = 20            # stop after this many non-finite steps in a row
    inspect_step: whole(-1) = -1            # print the batch of this step as text and stop
    allow_other_data: bool = False          # resume although data, seed or batch have changed
    tracker: str = ""                       # tensorboard, wandb, swanlab, or several with commas
    wandb_log: bool = False                 # the same as --tracker=wandb
    wandb_project: str = "mini-llm"         # project of wandb and swanlab
    wandb_run_name: str = ""                # the run's name there; empty: out_dir
    # the machine
    device: str = "auto"                    # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"                     # of the matmuls: auto, float32, bfloat16, float16
    compile: bool = False                   # torch.compile: slower to start, faster to run
    fp8: bool = False                       # 8-bit matmuls in the blocks: Ada, Hopper; MoE: Hopper
    activation_checkpointing: bool = False  # compute blocks again in the backward pass: less memory
    shard: bool = False                     # split AdamW's state over processes, as Muon's is
    deterministic: bool = False             # GPU: only kernels that give the same bits every time


def check(s, world):
    """Raise UserError for a setting that contradicts another."""
    global_batch = s.batch_size * s.gradient_accumulation_steps
    if global_batch > 10**8:
        raise UserError(f"batch_size={s.batch_size} times gradient_accumulation_steps="
                        f"{s.gradient_accumulation_steps} is more windows than one step can hold")
    if s.max_iters == s.epochs == 0:
        raise UserError("give the length of the training: max_iters or epochs above 0")
    if s.gradient_accumulation_steps % world:
        raise UserError(f"gradient_accumulation_steps={s.gradient_accumulation_steps} cannot be "
                        f"shared evenly by {world} processes: make it a multiple of {world}")
    if world > 1 and ":" in s.device:
        raise UserError(f"--device={s.device} is one device for {world} processes: "
                        "give --device=cuda, each takes its own")
    if s.checkpoint != "newest" and s.init_from == "scratch":
        raise UserError(f"checkpoint={s.checkpoint} needs --init_from=DIR, or --init_from=resume")
    if not fast_versions and (s.fp8 or (s.compile and world > 1)):
        raise UserError("--fp8, and with several processes --compile, need minillm/speed, which "
                        "was deleted: leave them out, or `git checkout minillm/speed`")
    trackers.names(s)


def count_steps(s, data):
    """How many steps max_iters and epochs make, whichever ends sooner."""
    global_batch = s.batch_size * s.gradient_accumulation_steps
    by_epochs = math.ceil(s.epochs * data.n_windows / global_batch)
    return min(steps for steps in (s.max_iters, by_epochs) if steps > 0)


def learning_rate(s, step):
    """The rate of a step: the schedule's, or that of the linear warm-up while it is lower."""
    end, left = s.lr_decay_iters or s.steps, 1.0
    if s.decay_lr and s.schedule == "cosine":
        progress = (step - s.warmup_iters) / max(1, end - s.warmup_iters)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    elif s.decay_lr and s.schedule == "linear":
        left = min(1.0, max(0.0, (end - step) / max(1, s.decay_share * end)))
    rate = s.min_lr + (s.learning_rate - s.min_lr) * left
    if step < s.warmup_iters:
        rate = min(rate, s.learning_rate * (step + 1) / s.warmup_iters)
    return rate


def build_model(s, data, start):
    """The model, on the CPU, with the weights of the checkpoint `start` if there is one.

    Raises UserError where the checkpoint, the settings and the data do not fit together.
    """
    if start:
        run_folder.check_tokenizer(start, data)
        config = checkpoint.model_config(start, GPTConfig)
        # RoPE has no weights, so the context length may change; dropout belongs to the training
        config.block_size, config.dropout = s.block_size, s.dropout
        for key in s.given & asdict(config).keys():
            asked, found = getattr(s, key), getattr(config, key)
            if asked != found and not (key in ("n_inner", "vocab_size") and asked == 0):
                raise UserError(f"the checkpoint has {key}={found}, these settings say {asked}: "
                                f"leave {key} out, or start from scratch")
    else:
        shape = {key: value for key, value in asdict(s).items() if hasattr(GPTConfig, key)}
        config = GPTConfig(**shape | {"vocab_size": s.vocab_size or data.meta["vocab_size"]})
    if config.vocab_size < data.meta["vocab_size"]:
        raise UserError(f"vocab_size={config.vocab_size} is smaller than the tokenizer's "
                        f"{data.meta['vocab_size']}")
    if start:
        with checkpoint.skip_init():             # the weights come from the file
            model = GPT(config)
        checkpoint.load_weights(model, start)
        return model
    torch.manual_seed(derive_seed(s.seed, "weights"))
    model = GPT(config)
    if s.optimizer == "muon":
        init_for_muon(model)
    return model


def make_step_model(model, device, compiled, parallel=None):
    """The model as a training step calls it. parallel: what wraps it for several processes."""
    if not parallel:
        return compile_for_training(model, device) if compiled else model
    if compiled:
        from minillm.speed.parts import compile_in_parts     # late: minillm/speed may be deleted
        compile_in_parts(model, device)
    return parallel(model)


def main():
    s = configure(Settings)
    rank, local_rank, world = rank_and_world()

    # ---- where to run
    check(s, world)
    device = pick_device(s.device, local_rank, world)
    dtype = pick_dtype(s.dtype, device)
    prepare(device, s.deterministic, s.compile)
    host_group = join(device, rank, world)

    # ---- data and model
    train_data = TokenData(s.data_dir, "train", s.block_size)
    val_data = TokenData(s.data_dir, "val", s.block_size) if s.eval_interval else None
    global_batch = s.batch_size * s.gradient_accumulation_steps
    s.steps = count_steps(s, train_data)
    tokenizer = run_tokenizer.find_tokenizer(train_data, s)
    if s.inspect_step >= 0:
        if rank == 0:
            windows = batch_windows(s.seed, s.inspect_step, global_batch, train_data.n_windows)
            show_windows(train_data, windows, Tokenizer.load(tokenizer))
        return
    lock = run_folder.lock_existing(s.out_dir) if rank == 0 else None
    resumed = run_folder.open_resumed(s, train_data)
    finetuning = not resumed and s.init_from != "scratch"
    start = resumed                                  # the checkpoint that the weights come from
    if finetuning:
        start = checkpoint.load_for_inference(s.init_from, s.checkpoint, check=True)
        if s.checkpoint != "newest":             # config.py does not keep it: name the file itself
            s.init_from = start["path"]
    model = build_model(s, train_data, start)
    if finetuning:
        run_facts.report_left_behind(s, start)
        redraw_collapsed_rows(model, train_data, s.seed)
    run_folder.fill_in(s, model.config, train_data.meta)
    compiled = s.compile and device.type != "mps"    # torch has no compiler for Apple's GPUs
    check_attention(model, flex=s.doc_mask and compiled and device.type == "cuda")
    check_loss(model)
    model.to(device).use_fast(compiled)
    if s.fp8:
        fast_versions.use_float8(model, device, dtype, s.batch_size * s.block_size)
    if s.activation_checkpointing:
        checkpoint_blocks(model)
    optimizer = make_optimizer(model, s, compiled, s.shard and world > 1)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first_step, best_val_loss = 0, math.inf
    if resumed:
        first_step, best_val_loss = resumed["step"], resumed["best_val_loss"]
        optimizer.load_state_dict(resumed["optimizer"])
        if resumed["scaler"].keys() == scaler.state_dict().keys():
            scaler.load_state_dict(resumed["scaler"])
        s.init_from = resumed["settings"].get("init_from", "scratch")    # where the run began
    if sum_over_ranks(host_group, first_step)[0] != first_step * world:
        raise UserError(f"the processes see different checkpoints: {s.out_dir} must lie on a disk "
                        "that all of them share")
    facts = run_facts.describe_run(s, model, train_data, device, dtype, world, first_step)
    step_model = make_step_model(model, device, compiled, data_parallel if world > 1 else None)

    def forward(x, y):
        """(sum of the cross-entropies, MoE statistics or None) of one micro-batch."""
        attn_mask = document_mask(x, flex=compiled and x.is_cuda) if s.doc_mask else None
        with autocast(device, dtype):
            return step_model(x, y, attn_mask)

    # ---- what the run leaves behind
    if rank == 0:
        lock = lock or run_folder.lock_for_writing(s)    # held until this process ends
    log = RunLog(s, model, facts, device, world, resumed, writes=rank == 0)
    resumed_step = first_step if resumed else None
    del resumed, start

    def begin_writing():
        """From the first finished step on, out_dir is this run's."""
        if rank == 0 and not log.has_begun:
            run_folder.begin(s, log, resumed_step, tokenizer, facts)

    def save(step, path, resumable):
        """Write a checkpoint, resumable or only weights. Returns False if the disk is full."""
        moments = optimizer.state_dict() if resumable else {}    # from all ranks
        if rank > 0:
            return True
        state = {"model": model.state_dict(), "model_config": asdict(model.config), "step": step,
                 "tokenizer_hash": train_data.meta["tokenizer_hash"],
                 "identity": run_folder.data_identity(s, train_data),
                 "fingerprint": fingerprint(model)}
        if resumable:
            state |= {"optimizer": moments, "scaler": scaler.state_dict(),
                      "best_val_loss": best_val_loss,
                      "settings": asdict(s) | {"job": launch_id()}} | log.state(step)
        begin_writing()
        log.metrics.sync()
        return run_folder.save(path, state, s)

    def read_batches(step):
        """This rank's micro-batches of a step, on the device; how many tokens are supervised."""
        batches, n_local = rank_batches(train_data, s.seed, step, s.batch_size,
                                        s.gradient_accumulation_steps, rank, world)
        return [to_device(batch, device) for batch in batches], n_local

    # ---- the loop. `step` counts the finished ones
    stop = StopSignal()
    # if validation computes the same function as training, one compiled graph serves both
    one_graph = compiled and not (s.dropout or s.fp8) and not noisy_in_training(model)
    step, last_save_worked = first_step, True
    batches, n_local = read_batches(step) if step < s.steps else ([], 0)
    model.train()
    while True:
        # 1) between two steps: begin to write, evaluate, save, stop
        # n_supervised: the supervised tokens in the coming step's global batch
        n_supervised, stopping = sum_over_ranks(host_group, n_local, stop.asked)
        last = step >= s.steps or stopping > 0
        evaluating = s.eval_interval and not stopping and (step % s.eval_interval == 0 or last)
        saving = last or (step > 0 and s.checkpoint_interval and step % s.checkpoint_interval == 0)
        if evaluating or saving:
            log.catch_up()
        if log.bad_in_a_row >= s.max_bad_steps:
            raise UserError(bad_steps_message(s, log, train_data))
        if step > first_step or (last and resumed_step is not None):
            begin_writing()
        if evaluating:
            model.train(one_graph)
            with torch.set_grad_enabled(one_graph):
                val_loss = validation_loss(forward, val_data, s, device, rank, world, stop)
            model.train()
            last = last or val_loss is None          # stopped half-way: resuming evaluates first
            if val_loss is not None:
                log.validation(step, val_loss)
                is_best = val_loss < best_val_loss
                if is_best and s.save_best and step > 0:
                    is_best = save(step, checkpoint.best_path(s.out_dir), resumable=False)
                if is_best:
                    best_val_loss = val_loss
        if (saving or last) and step > first_step:
            last_save_worked = save(step, checkpoint.step_path(s.out_dir, step), resumable=True)
        if last:
            break
        if evaluating or saving:
            log.restart_clock(step)

        # 2) loss and gradient of the global batch, micro-batch by micro-batch
        lr = learning_rate(s, step)
        optimizer.set_rate(lr)
        loss_sum, balance_mean, load_mean = 0.0, 0.0, 0.0
        for micro, (x, y) in enumerate(batches):
            # randomness is a function of (seed, step, place in the global batch): nothing to save
            torch.manual_seed(derive_seed(s.seed, step, micro * world + rank))
            if world > 1:                            # gradients travel only in the last micro-step
                step_model.require_backward_grad_sync = micro == len(batches) - 1
            loss, moe_stats = forward(x, y)
            # 0, or NaN if the loss is not finite: the gradient is NaN too, and set_clipping sees it
            nan_if_bad = 0 * loss.detach()
            objective = loss * (world / max(n_supervised, 1) + nan_if_bad)   # DDP divides by world
            if moe_stats:
                balance_loss, load = moe_stats
                weight = s.aux_loss_weight * world / s.gradient_accumulation_steps
                objective = objective + weight * balance_loss
                balance_mean = balance_mean + balance_loss.detach() / len(batches)
                load_mean = load_mean + load / len(batches)
            scaler.scale(objective).backward()
            loss_sum = loss_sum + loss.detach()
        if step + 1 < s.steps:
            batches, n_local = read_batches(step + 1)    # while the device is busy

        # 3) the update, which changes nothing if the gradient is not finite
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.set_clipping(norm, s.grad_clip)        # `step` divides the gradients
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # 4) its numbers over all ranks: [loss, norm] and an MoE's [balance_loss, load of each layer
        # and expert]; RunLog.catch_up takes them apart
        numbers = torch.stack((loss_sum / max(n_supervised, 1), norm))
        if moe_stats:
            numbers = torch.cat((numbers, balance_mean[None], load_mean.flatten()))
        if world > 1:
            numbers[1:] /= world                     # the loss is a sum over ranks, the rest a mean
            torch.distributed.all_reduce(numbers)
        log.step(step, lr, numbers)
        step += 1

    # ---- the end
    if rank == 0:
        log.close(step)
    if world > 1:
        torch.distributed.destroy_process_group()
    if not last_save_worked:
        raise UserError(f"the state at step {step} could not be saved: make room, then give "
                        "--init_from=resume, or the same command if none was saved before")


if __name__ == "__main__":
    run(main)
