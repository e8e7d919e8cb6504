"""Train a model on token files: pretraining or SFT, dense or mixture of experts, on one device or many.

    python train.py                                              # the demo's pretraining, on a laptop
    python train.py config/demo_sft.py                           # then its SFT
    python train.py config/pretrain.py --batch_size=32           # 171 M parameters, one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/moe_sft.py
    python train.py config/pretrain.py --init_from=resume        # go on after a crash or Ctrl-C

The loop below reads from top to bottom. What it promises: the batch and the randomness of step s
depend on (seed, s) alone; the loss of a step is the sum over the learned tokens of the whole global
batch divided by their number, however it is cut into micro-steps and processes; a run that is killed
and resumed goes on bit for bit as if it had not been (same machine, same settings, and on a GPU
--deterministic=True); a step whose loss or gradient is not finite changes nothing. Ctrl-C or SIGTERM
finishes the step, saves and exits 0; a second Ctrl-C leaves at once.
"""
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from minillm import checkpoint
from minillm.attention import document_mask
from minillm.configurator import BelowOne, NonNegative, NonNegativeFloat, Positive, configure, number, whole
from minillm.errors import UserError, run
from minillm.dataloader import TokenData, batch_windows, derive_seed, permute, show_windows
from minillm.device import autocast, compile_for_training, describe, peak_flops, pick_device, pick_dtype, send
from minillm.speed.float8 import use_float8
from minillm.distributed import agree, join_job, rank_and_world
from minillm.run_log import RunLog, check_wandb, say
from minillm.run_folder import build_model, identity, job, open_resumed


@dataclass
class Settings:
    # files
    out_dir: str = "out/demo_pretrain"      # checkpoints, tokenizer, config and metrics go here
    data_dir: str = "data/demo/pretrain"    # what prepare_pretrain.py or prepare_sft.py wrote
    init_from: str = "scratch"              # scratch, resume (go on in out_dir), or a folder whose weights to start from
    overwrite: bool = False                 # start over in an out_dir that already holds a run
    # the model; with init_from=DIR its shape comes from there
    n_layer: whole(1, 10**4) = 2            # blocks
    n_head: Positive = 4                    # query heads
    n_kv_head: Positive = 2                 # key/value heads, each shared by n_head / n_kv_head query heads
    n_embd: whole(1, 10**7) = 192           # width of the residual stream
    n_inner: whole(0, 10**8) = 0            # width of the FFN or of one expert; 0: 4 * n_embd
    n_expert: NonNegative = 0               # experts per layer; 0: a dense model
    n_expert_per_tok: Positive = 4          # experts that each token visits
    block_size: whole(1, 10**8) = 128       # tokens in a window: the context length
    vocab_size: whole(0, 10**7) = 0         # rows of the embedding; 0: the tokenizer's vocabulary
    rope_theta: number(1) = 10000.0         # base of the RoPE frequencies
    dropout: float = 0.0                    # on the embedding and after each sub-layer
    bias: bool = False                      # biases in the linear layers
    # the data of a step: batch_size * gradient_accumulation_steps windows, over all processes together
    batch_size: whole(1, 10**7) = 16        # windows in one micro-step of one process
    gradient_accumulation_steps: whole(1, 10**7) = 1# micro-steps in a step, counted over all processes
    doc_mask: bool = False                  # attention never crosses from one document to the next
    seed: int = 1337                        # of weights, data order, dropout and router noise
    # the optimizer: AdamW, linear warm-up, then cosine down to min_lr
    max_iters: NonNegative = 1500           # steps; 0: as many as epochs says
    epochs: NonNegativeFloat = 0.0          # passes over the data; 0: as many as max_iters says; with both, whichever is sooner
    learning_rate: NonNegativeFloat = 4e-3  # at the end of the warm-up
    min_lr: NonNegativeFloat = 4e-4         # at the end of the decay
    warmup_iters: NonNegative = 100         # steps of linear warm-up
    lr_decay_iters: NonNegative = 0         # step at which min_lr is reached; 0: the last one
    decay_lr: bool = True                   # False: constant after the warm-up
    weight_decay: NonNegativeFloat = 0.1    # on matrices; never on norms and biases
    beta1: BelowOne = 0.9                   # AdamW's decay of the mean gradient
    beta2: BelowOne = 0.95                  # AdamW's decay of the mean squared gradient
    grad_clip: NonNegativeFloat = 1.0       # largest gradient norm; 0: no clipping
    aux_loss_weight: NonNegativeFloat = 0.05# weight of the balance loss of a mixture of experts
    # watching and saving
    log_interval: Positive = 50             # steps between log lines and records in metrics.jsonl
    eval_interval: NonNegative = 500        # steps between validations; 0: none
    eval_iters: Positive = 50               # validation batches of batch_size windows, always the same ones
    checkpoint_interval: NonNegative = 500  # steps between checkpoints; 0: only at the end
    keep_checkpoints: Positive = 2          # how many of the newest to keep
    save_best: bool = True                  # also keep the weights of the best validation loss
    max_bad_steps: Positive = 20            # stop after so many steps in a row without a finite loss and gradient
    inspect_step: whole(-1) = -1            # print the batch of this step as text and stop
    allow_other_data: bool = False          # resume although data, seed or batch are not those of the checkpoint
    wandb_log: bool = False                 # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "mini-llm"         # its project
    wandb_run_name: str = ""                # its run name; empty: out_dir
    # the machine
    device: str = "auto"                    # auto, cpu, cuda, cuda:N
    dtype: str = "auto"                     # of the matrix products: auto, float32, bfloat16, float16
    compile: bool = False                   # torch.compile: slower to start, faster to run
    fp8: bool = False                       # matrix products of a dense model's blocks in 8 bits (Ada, Hopper and later); pays if compiled
    deterministic: bool = False             # GPU: only kernels that give the same bits every time


def check(s, world):
    """Raise UserError for a setting that contradicts another."""
    if s.batch_size * s.gradient_accumulation_steps > 10**8:
        raise UserError(f"batch_size={s.batch_size} times gradient_accumulation_steps={s.gradient_accumulation_steps} "
                        "is more windows than one step can hold")
    if s.max_iters == s.epochs == 0:
        raise UserError("give the length of the training: max_iters or epochs above 0")
    if s.gradient_accumulation_steps % world:
        raise UserError(f"gradient_accumulation_steps={s.gradient_accumulation_steps} cannot be shared evenly by {world} processes: "
                        f"make it a multiple of {world}")
    if world > 1 and ":" in s.device:
        raise UserError(f"--device={s.device} is one device for {world} processes: give --device=cuda, each takes its own")
    check_wandb(s)


def learning_rate(s, step):
    """Linear warm-up from learning_rate / warmup_iters, then half a cosine down to min_lr."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    if not s.decay_lr:
        return s.learning_rate
    end = s.lr_decay_iters or s.max_iters
    progress = min(1.0, (step - s.warmup_iters) / max(1, end - s.warmup_iters))
    return s.min_lr + (s.learning_rate - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, s):
    """AdamW; matrices decay, norms and biases don't. fused: one kernel, which can also skip a step by itself."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)


def main():
    s = configure(Settings)
    started = time.time()
    rank, local_rank, world = rank_and_world()
    master = rank == 0
    sys.stdout.reconfigure(errors="replace", line_buffering=True)

    # ---- where to run
    check(s, world)
    device = pick_device(f"cuda:{local_rank}" if world > 1 and s.device in ("auto", "cuda") and torch.cuda.is_available() else s.device)
    dtype = pick_dtype(s.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")          # what cuBLAS needs to be deterministic
    torch.use_deterministic_algorithms(s.deterministic)
    control = None                              # a group for host-side numbers, so that agreeing never waits for a GPU
    if world > 1:
        join_job("nccl" if device.type == "cuda" else "gloo", rank, world)
        control = dist.new_group(backend="gloo")

    # ---- data and model
    train_data = TokenData(s.data_dir, "train", s.block_size)
    val_data = TokenData(s.data_dir, "val", s.block_size) if s.eval_interval else None
    global_batch = s.batch_size * s.gradient_accumulation_steps
    by_epochs = math.ceil(s.epochs * train_data.n_windows / global_batch)
    s.max_iters = min(steps for steps in (s.max_iters, by_epochs) if steps > 0)
    if s.inspect_step >= 0:
        return master and show_windows(train_data, batch_windows(s.seed, s.inspect_step, global_batch, train_data.n_windows))
    tokenizer = checkpoint.find_tokenizer(train_data.meta, s.out_dir)
    resumed = open_resumed(s, train_data)
    start = checkpoint.load_for_inference(s.init_from, check=True) if not resumed and s.init_from != "scratch" else resumed
    model = build_model(s, train_data, start).to(device).use_fast(s.compile)
    if s.fp8:
        use_float8(model, device, dtype, s.batch_size * s.block_size)
    optimizer = make_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first_step, best_val_loss, bad_steps, wandb_id = 0, math.inf, [0, 0], None
    if resumed:
        checkpoint.load_optimizer(optimizer, resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"] or scaler.state_dict())
        first_step, best_val_loss, bad_steps, wandb_id = (resumed.get(key) for key in ("step", "best_val_loss", "bad_steps", "wandb_id"))
        s.init_from = resumed["settings"]["init_from"]
    if agree(control, first_step)[0] != first_step * world:
        raise UserError(f"the processes see different checkpoints: {s.out_dir} must lie on a disk that all of them share")
    total, active = model.n_params()
    say(f"{describe(device)}, {str(dtype).removeprefix('torch.')}{' and float8' * s.fp8}, {world} process{'es' * (world > 1)} · {total:,} parameters"
        + (f", {active:,} active per token" if active != total else ""))
    say(f"{s.data_dir}: {len(train_data.tokens):,} tokens, {train_data.n_windows:,} windows · {s.max_iters:,} steps of {global_batch} windows, "
        f"{s.max_iters * global_batch / train_data.n_windows:.2f} epochs" + (f" · resuming at step {first_step}" if resumed else ""))
    step_model = model
    if world > 1:
        model._ddp_params_and_buffers_to_ignore = ["rope"]    # the same constant everywhere: not worth a broadcast a step
        step_model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if s.compile:
        step_model = compile_for_training(step_model, device)

    # ---- what the run leaves behind
    log = None
    if master:
        lock = checkpoint.lock(s.out_dir)       # until this process ends, nobody else writes there
        try:
            if not resumed:
                checkpoint.clear(s.out_dir)
            checkpoint.clean(s.out_dir, first_step)
            checkpoint.copy_tokenizer(tokenizer, s.out_dir)
            checkpoint.write_settings(s.out_dir, s)
            log = RunLog(s, model, global_batch * s.block_size, peak_flops(device) and peak_flops(device) * world, first_step, wandb_id)
        except OSError as error:
            raise UserError(f"cannot write to {s.out_dir}: {error.strerror}") from None
    saved_step = first_step if resumed else -1
    del resumed, start

    def save(step, path, whole):
        """Write a checkpoint; whole: with all that resuming needs, else the weights alone. A full disk is reported and survived: False."""
        if not master:
            return True
        state = {"model": model.state_dict(), "model_config": asdict(model.config), "step": step, "tokenizer_hash": train_data.meta["tokenizer_hash"]}
        if whole:
            state |= {"optimizer": optimizer.state_dict()["state"], "scaler": scaler.state_dict(), "best_val_loss": best_val_loss, "bad_steps": bad_steps,
                      "identity": identity(s, train_data), "settings": asdict(s) | {"job": job()}, "wandb_id": log.wandb_id}
        try:
            log.metrics.sync()
            checkpoint.save(path, state)
            checkpoint.prune(s.out_dir, s.keep_checkpoints)
            return True
        except (OSError, RuntimeError) as error:     # torch's zip writer reports a full disk as RuntimeError
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            say(f"could not save {path}: {reason}; the checkpoints before it are untouched, training goes on")
            return False

    # ---- Ctrl-C or SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once.
    stop = []

    def on_signal(number, frame):
        # a launcher may pass on a Ctrl-C that the terminal has sent to its processes already
        if number == signal.SIGINT and stop and time.monotonic() - stop[0] >= (world > 1):
            os._exit(128 + number)
        stop.append(time.monotonic())
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)

    def micro_batches(step):
        """This process's share of the step's windows, and how many targets they hold: micro-batch m of rank r is the slice m * world + r."""
        windows = batch_windows(s.seed, step, global_batch, train_data.n_windows).reshape(-1, s.batch_size)
        batches = [train_data.windows(rows) for rows in windows[rank::world]]
        # counted on the host: a question to the GPU would wait until it has done all that it was given
        return [send(batch, device) for batch in batches], sum((y >= 0).sum().item() for _, y in batches)

    def attention_mask(x):
        return document_mask(x, flex=s.compile and device.type == "cuda") if s.doc_mask else None

    @torch.no_grad()
    def evaluate():
        """Mean loss per learned token over a fixed set of validation windows: the language loss alone. None if a signal cut it short."""
        model.eval()
        windows = permute(range(min(s.eval_iters * s.batch_size, val_data.n_windows)), val_data.n_windows, 0)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for start in range(rank * s.batch_size, len(windows), world * s.batch_size):
            if stop:
                sums[2] += 1
                break
            rows = windows[start: start + s.batch_size]
            x, y = val_data.windows(rows.tolist() + [rows[0]] * (s.batch_size - len(rows)))
            y[len(rows):] = -1                       # the last batch is filled up, so that all have one shape
            x, y = send((x, y), device)
            with autocast(device, dtype):
                loss, _ = step_model(x, y, attention_mask(x))
            sums[:2] += torch.stack((loss.double(), (y >= 0).sum()))
        if world > 1:
            dist.all_reduce(sums)
        model.train()
        total, learned, cut_short = sums.tolist()
        return None if cut_short else total / max(learned, 1)

    def finish(step, lr, numbers, arrived):
        """Log a step's numbers, once they have arrived. Called while the next step is already running."""
        if arrived:
            arrived.synchronize()
        loss, norm, *moe = numbers.tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        bad_steps[:] = [0, bad_steps[1]] if finite else [bad_steps[0] + 1, bad_steps[1] + 1]       # in a row, in all
        if master:
            log.step(step, lr, loss, norm, moe, bad_steps[1])
        if bad_steps[0] >= s.max_bad_steps:
            windows = batch_windows(s.seed, step, global_batch, train_data.n_windows).tolist()
            raise UserError(f"stopped at step {step}, the last of {bad_steps[0]} in a row without a finite loss and gradient; its windows: "
                            f"{windows[:8]}{'...' if len(windows) > 8 else ''}; the same command with --inspect_step={step} prints them")

    # ---- the loop. `step` counts the finished ones; between two steps is the time to evaluate and to save
    step, val_loss, pending, saved = first_step, None, None, True
    batches, targets = micro_batches(step) if step < s.max_iters else ([], 0)
    model.train()
    while True:
        # `learned`: targets in the whole global batch of the coming step, before any of them is used
        learned, stopping = agree(control, targets, len(stop))
        last = step >= s.max_iters or stopping > 0
        evaluating = s.eval_interval and not stopping and (step % s.eval_interval == 0 or last)
        saving = last or step > 0 and s.checkpoint_interval and step % s.checkpoint_interval == 0
        if pending and (evaluating or saving):
            finish(*pending)
            pending = None
        if evaluating:
            val_loss = evaluate()
            last = last or val_loss is None          # stopped half-way; resuming will evaluate first
            if master and val_loss is not None:
                log.validation(step, val_loss)
            if val_loss is not None and val_loss < best_val_loss:
                if not s.save_best or step == 0 or save(step, os.path.join(s.out_dir, "best.pt"), whole=False):
                    best_val_loss = val_loss
        if (saving or last) and step > saved_step:
            saved = save(step, checkpoint.step_path(s.out_dir, step), whole=True)
        if last:
            break
        if master and (evaluating or saving):
            log.restart_clock(step)

        lr = learning_rate(s, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum, balance, share = 0.0, 0.0, 0.0
        for micro, (x, y) in enumerate(batches):
            # randomness is a function of (seed, step, place in the global batch): nothing to store, nothing to restore
            torch.manual_seed(derive_seed(s.seed, step, micro * world + rank))
            if world > 1:                            # gradients travel only in the last micro-step
                step_model.require_backward_grad_sync = micro == len(batches) - 1
            with autocast(device, dtype):
                loss, moe = step_model(x, y, attention_mask(x))
            # DDP averages over processes, `world` makes it a sum. A loss that is not finite is made to have such a
            # gradient, so that one test of the summed gradient's norm serves for both, on all processes alike
            objective = loss * (world / max(learned, 1) + 0 * loss.detach())
            if moe:
                objective = objective + s.aux_loss_weight * moe[0] * (world / s.gradient_accumulation_steps)
                balance, share = balance + moe[0].detach() / len(batches), share + moe[1] / len(batches)
            scaler.scale(objective).backward()
            loss_sum = loss_sum + loss.detach()
        if step + 1 < s.max_iters:
            batches, targets = micro_batches(step + 1)       # read while the device is busy

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        # AdamW's fused kernel divides by grad_scale, which saves a pass over all gradients, and leaves everything as it is where
        # found_inf is 1: the host needn't ask. (A scaler that is on puts its own found_inf there.)
        optimizer.grad_scale, optimizer.found_inf = (norm / (s.grad_clip or math.inf)).clamp(min=1), (~norm.isfinite()).float()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        numbers = torch.stack((loss_sum / max(learned, 1), norm))
        if moe:
            numbers = torch.cat((numbers, balance[None], share.flatten()))
        if world > 1:
            numbers[1:] /= world                     # the loss is a sum over processes, all else a mean
            dist.all_reduce(numbers)
        arrived = None
        if device.type == "cuda":                    # sent off now: asked for later, they would queue behind all of the next step
            numbers, arrived = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        if pending:
            finish(*pending)
        pending = (step, lr, numbers, arrived)
        if device.type == "cpu":                     # nothing is running meanwhile
            finish(*pending)
            pending = None
        step += 1

    if master:
        seconds = time.time() - started
        log.write({"step": step, "seconds": seconds, "tokens": (step - first_step) * global_batch * s.block_size,
                   "parameters": total, "active_parameters": active})
        log.bar.close()
        say(f"{'done' if step >= s.max_iters else 'stopped'} at step {step} after {seconds:.0f} s"
            + (f" · validation loss {val_loss:.4f}" if val_loss is not None else "") + f" · {s.out_dir}"
            + ("" if step >= s.max_iters else " · --init_from=resume goes on"))
    if world > 1:
        dist.destroy_process_group()
    if not saved:
        raise UserError(f"the state at step {step} could not be saved: make room, then --init_from=resume goes on from the checkpoint before")


if __name__ == "__main__":
    run(main)
