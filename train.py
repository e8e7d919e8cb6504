"""Train a model on token files: pretraining or SFT, dense or mixture of experts, on one device or many.

    python train.py                                              # the demo's pretraining, on a laptop
    python train.py config/demo_sft.py                           # then its SFT
    python train.py config/pretrain.py --batch_size=32           # 171 M parameters, one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/moe_sft.py
    python train.py config/pretrain.py --init_from=resume        # go on after a crash or Ctrl-C

The loop below reads from top to bottom. What it promises: the batch and the randomness of step s
depend on (seed, s) alone; the loss of a step is the sum over the learned tokens of the whole global
batch divided by their number, however it is cut into micro-steps and processes; a run that is killed
and resumed goes on bit for bit as if it had not been (same machine, same settings); a step whose
gradient is not finite changes nothing.
"""
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from configurator import UserError, configure, field_comments, run
from data import TokenData, batch_windows, derive_seed, fingerprint, permute
from device import autocast, describe, peak_flops, pick_device, pick_dtype, rank_and_world
from model import GPT, GPTConfig


@dataclass
class Settings:
    # files
    out_dir: str = "out/demo_pretrain"      # checkpoints, tokenizer, config and metrics go here
    data_dir: str = "data/demo/pretrain"    # what prepare_pretrain.py or prepare_sft.py wrote
    init_from: str = "scratch"              # scratch, resume (go on in out_dir), or a folder whose weights to start from
    overwrite: bool = False                 # start over in an out_dir that already holds a run
    # the model; with init_from=DIR its shape comes from there
    n_layer: int = 4                        # blocks
    n_head: int = 4                         # query heads
    n_kv_head: int = 2                      # key/value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 128                       # width of the residual stream
    n_inner: int = 0                        # width of the FFN or of one expert; 0: 4 * n_embd
    n_expert: int = 0                       # experts per layer; 0: a dense model
    n_expert_per_tok: int = 4               # experts that each token visits
    block_size: int = 128                   # tokens in a window: the context length
    vocab_size: int = 0                     # rows of the embedding; 0: the tokenizer's vocabulary
    rope_theta: float = 10000.0             # base of the RoPE frequencies
    dropout: float = 0.0                    # on the embedding and after each sub-layer
    bias: bool = False                      # biases in the linear layers
    # the data of a step: batch_size * gradient_accumulation_steps windows, over all processes together
    batch_size: int = 16                    # windows in one micro-step of one process
    gradient_accumulation_steps: int = 1    # micro-steps in a step, counted over all processes
    doc_mask: bool = False                  # attention never crosses from one document to the next
    seed: int = 1337                        # of weights, data order, dropout and router noise
    # the optimizer: AdamW, linear warm-up, then cosine down to min_lr
    max_iters: int = 1500                   # steps; 0: as many as epochs says
    epochs: float = 0.0                     # passes over the data; 0: as many as max_iters says; with both, whichever is sooner
    learning_rate: float = 4e-3             # at the end of the warm-up
    min_lr: float = 4e-4                    # at the end of the decay
    warmup_iters: int = 100                 # steps of linear warm-up
    lr_decay_iters: int = 0                 # step at which min_lr is reached; 0: the last one
    decay_lr: bool = True                   # False: constant after the warm-up
    weight_decay: float = 0.1               # on matrices; never on norms and biases
    beta1: float = 0.9                      # AdamW's decay of the mean gradient
    beta2: float = 0.95                     # AdamW's decay of the mean squared gradient
    grad_clip: float = 1.0                  # largest gradient norm; 0: no clipping
    aux_loss_weight: float = 0.05           # weight of the balance loss of a mixture of experts
    # watching and saving
    log_interval: int = 50                  # steps between log lines and records in metrics.jsonl
    eval_interval: int = 500                # steps between validations; 0: none
    eval_iters: int = 50                    # validation batches of batch_size windows, always the same ones
    checkpoint_interval: int = 500          # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2               # how many of the newest to keep
    save_best: bool = True                  # also keep the weights of the best validation loss
    max_bad_steps: int = 20                 # stop after so many steps in a row without a finite gradient
    inspect_step: int = -1                  # print the batch of this step as text and stop
    allow_other_data: bool = False          # resume although data, seed or batch are not those of the checkpoint
    wandb_log: bool = False                 # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "mini-llm"         # its project
    wandb_run_name: str = ""                # its run name; empty: out_dir
    # the machine
    device: str = "auto"                    # auto, cpu, cuda, cuda:N
    dtype: str = "auto"                     # of the matrix products: auto, float32, bfloat16, float16
    compile: bool = False                   # torch.compile: slower to start, faster to run
    deterministic: bool = False             # GPU: only kernels that give the same bits every time


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


def build_model(s, data, resumed):
    """(model, the checkpoint it was loaded from or None), still on the CPU. UserError where the shapes differ."""
    shape = {f.name: getattr(s, f.name) for f in fields(GPTConfig)}
    shape["vocab_size"] = s.vocab_size or data.meta["vocab_size"]
    if shape["vocab_size"] < data.meta["vocab_size"]:
        raise UserError(f"vocab_size={shape['vocab_size']} is smaller than the tokenizer's {data.meta['vocab_size']}")
    start = resumed
    if s.init_from not in ("scratch", "resume"):
        start = checkpoint.load_for_inference(s.init_from)
        # RoPE has no weights, so a model may go on with another context length; dropout is a matter of training
        shape = start["model_config"] | {"block_size": s.block_size, "dropout": s.dropout}
    config = GPTConfig(**shape)
    if resumed:
        for key, old in resumed["model_config"].items():
            if old != getattr(config, key):
                raise UserError(f"the checkpoint in {s.out_dir} has {key}={old}, these settings say {getattr(config, key)}")
    if start:
        if start["tokenizer_hash"] != data.meta["tokenizer_hash"]:
            raise UserError(f"the checkpoint was trained with tokenizer {start['tokenizer_hash'][:12]}, "
                            f"{s.data_dir} was prepared with {data.meta['tokenizer_hash'][:12]}: prepare it with the checkpoint's tokenizer")
    torch.manual_seed(derive_seed(s.seed, "weights"))
    model = GPT(config)
    if start:
        model.load_state_dict(start["model"])
    return model


def identity(s, data):
    """What must not change between a checkpoint and its resumption: the data, and their order."""
    return {"data": fingerprint(data.meta), "seed": s.seed, "block_size": s.block_size,
            "windows in a step": s.batch_size * s.gradient_accumulation_steps}


def open_resumed(s, data, say):
    """The newest whole checkpoint of out_dir, or None to start anew."""
    steps = checkpoint.saved_steps(s.out_dir)
    # torchrun --max-restarts starts the same command again: the second time it must go on
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not (s.init_from == "resume" or restarted and steps):
        if steps and not s.overwrite:
            raise UserError(f"{s.out_dir} already holds a run at step {steps[0]}: "
                            "--init_from=resume goes on with it, --overwrite=True starts over")
        return None
    resumed = checkpoint.load_newest(s.out_dir, say)
    for key, value in identity(s, data).items():
        if resumed["identity"][key] != value and not s.allow_other_data:
            raise UserError(f"the checkpoint in {s.out_dir} was trained with {key} {resumed['identity'][key]}, now it is {value}; "
                            "--allow_other_data=True goes on all the same")
    return resumed


def show_batch(s, data, step):
    """--inspect_step: the windows of a step as text, learned tokens only marked by what stands around them."""
    from tokenizer import Tokenizer
    tokenizer = Tokenizer.load(data.meta["tokenizer"])
    for window in batch_windows(s.seed, step, s.batch_size * s.gradient_accumulation_steps, data.n_windows):
        x, y = data.windows([window])
        print(f"--- step {step}, window {window}, {(y >= 0).sum().item()} learned tokens\n{tokenizer.decode(x[0].tolist(), skip_special=False)}")


class MetricsFile:
    """out_dir/metrics.jsonl. On resuming, records from `step` on are dropped: they will be written again."""

    def __init__(self, path, step):
        old = []
        if step and os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                old = [line for line in file if line.endswith("\n") and json.loads(line)["step"] < step]
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(old)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a", encoding="utf-8")

    def write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def main():
    s = configure(Settings)
    started = time.time()
    rank, local_rank, world = rank_and_world()
    master = rank == 0

    def say(text):
        if master:
            tqdm.write(text)

    # ---- where to run
    device = pick_device(f"cuda:{local_rank}" if world > 1 and s.device in ("auto", "cuda") and torch.cuda.is_available() else s.device)
    dtype = pick_dtype(s.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(s.deterministic)
    if s.batch_size < 1 or s.gradient_accumulation_steps < 1:
        raise UserError("batch_size and gradient_accumulation_steps must be at least 1")
    if s.gradient_accumulation_steps % world:
        raise UserError(f"gradient_accumulation_steps={s.gradient_accumulation_steps} cannot be shared evenly by {world} processes: "
                        f"make it a multiple of {world}")
    control = None                              # a group for host-side numbers, so that agreeing never waits for a GPU
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")

    # ---- data and model
    train_data, val_data = (TokenData(s.data_dir, split, s.block_size) for split in ("train", "val"))
    global_batch = s.batch_size * s.gradient_accumulation_steps
    by_epochs = math.ceil(s.epochs * train_data.n_windows / global_batch)
    if s.max_iters <= 0 >= by_epochs:
        raise UserError("give the length of the training: max_iters or epochs above 0")
    s.max_iters = min(steps for steps in (s.max_iters, by_epochs) if steps > 0)
    if s.inspect_step >= 0:
        return show_batch(s, train_data, s.inspect_step)
    resumed = open_resumed(s, train_data, say)
    model = build_model(s, train_data, resumed).to(device)
    optimizer = make_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first_step, best_val_loss, wandb_id = 0, float("inf"), None
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        first_step, best_val_loss, wandb_id = resumed["step"], resumed["best_val_loss"], resumed["wandb_id"]
    del resumed
    total, active = model.n_params()
    say(f"{describe(device)}, {str(dtype).removeprefix('torch.')}, {world} process{'es' * (world > 1)} · {total:,} parameters"
        + (f", {active:,} active per token" if active != total else ""))
    say(f"{s.data_dir}: {len(train_data.tokens):,} tokens, {train_data.n_windows:,} windows · {s.max_iters:,} steps of {global_batch} windows, "
        f"{s.max_iters * global_batch / train_data.n_windows:.2f} epochs" + (f" · resuming at step {first_step}" if first_step else ""))
    step_model = model
    if world > 1:
        model._ddp_params_and_buffers_to_ignore = ["rope"]    # the same constant everywhere: not worth a broadcast a step
        step_model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if s.compile:
        step_model = torch.compile(step_model, dynamic=False)

    # ---- what the run leaves behind
    metrics, log_run = None, None
    if master:
        os.makedirs(s.out_dir, exist_ok=True)
        if not first_step:
            for step in checkpoint.saved_steps(s.out_dir):
                checkpoint.remove(checkpoint.step_path(s.out_dir, step))
            checkpoint.remove(os.path.join(s.out_dir, "best.pt"))
        checkpoint.prune(s.out_dir, s.keep_checkpoints + 1)
        checkpoint.copy_tokenizer(train_data.meta["tokenizer"], s.out_dir)
        write_config(s)
        metrics = MetricsFile(os.path.join(s.out_dir, "metrics.jsonl"), first_step)
        if s.wandb_log:
            import wandb
            log_run = wandb.init(project=s.wandb_project, name=s.wandb_run_name or s.out_dir, id=wandb_id, resume="allow", config=asdict(s))

    def save(step, path, whole):
        """whole: all that resuming needs; otherwise the weights alone. A full disk is reported and survived."""
        if not master:
            return
        state = {"model": model.state_dict(), "model_config": asdict(model.config), "step": step, "best_val_loss": best_val_loss,
                 "tokenizer_hash": train_data.meta["tokenizer_hash"], "identity": identity(s, train_data)}
        if whole:
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "wandb_id": log_run and log_run.id}
        try:
            checkpoint.save(path, state)
            checkpoint.prune(s.out_dir, s.keep_checkpoints)
        except (OSError, RuntimeError) as error:     # torch's zip writer reports a full disk as RuntimeError
            say(f"could not save {path}: {error}; the checkpoints before it are untouched, training goes on")

    # ---- Ctrl-C or SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once.
    stop = []
    if master or world > 1:
        def on_signal(number, frame):
            if stop:
                os._exit(128 + number)
            stop.append(number)
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)

    def micro_batches(step):
        """This process's share of the step's windows: micro-batch m of rank r is the slice m * world + r."""
        windows = batch_windows(s.seed, step, global_batch, train_data.n_windows).reshape(-1, s.batch_size)
        return [to_device(train_data.windows(rows)) for rows in windows[rank::world]]

    def to_device(batch):
        if device.type == "cpu":
            return batch
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)

    @torch.no_grad()
    def evaluate():
        """Mean loss per learned token over a fixed set of validation windows: the language loss alone."""
        model.eval()
        windows = permute(range(min(s.eval_iters * s.batch_size, val_data.n_windows)), val_data.n_windows, 0)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for start in range(rank * s.batch_size, len(windows), world * s.batch_size):
            rows = windows[start: start + s.batch_size]
            x, y = val_data.windows(rows.tolist() + [rows[0]] * (s.batch_size - len(rows)))
            y[len(rows):] = -1                       # the last batch is filled up, so that all have one shape
            x, y = to_device((x, y))
            with autocast(device, dtype):
                loss, _ = step_model(x, y, doc_mask=s.doc_mask)
            sums += torch.stack((loss.double(), (y >= 0).sum()))
        if world > 1:
            dist.all_reduce(sums)
        model.train()
        return (sums[0] / sums[1].clamp(min=1)).item()

    # ---- the loop
    flops, peak = model.flops_per_token(s.block_size), peak_flops(device)
    tokens_per_step = global_batch * s.block_size
    bar = tqdm(total=s.max_iters, initial=first_step, unit="step", disable=not (master and sys.stderr.isatty()), dynamic_ncols=True)
    pending, bad_in_a_row, starved = None, 0, torch.zeros(1)
    val_loss, step = None, first_step
    clock, clock_step = time.perf_counter(), first_step
    batches = micro_batches(step) if step < s.max_iters else []
    model.train()

    def report(record_of, numbers):
        """Read a finished step's numbers back and log them. Called while the next step is already running."""
        nonlocal bad_in_a_row, clock, clock_step, starved
        step, lr = record_of
        loss, norm, *moe = numbers.tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        bad_in_a_row = 0 if finite else bad_in_a_row + 1
        bar.update(1)
        if not finite:
            say(f"step {step}: loss {loss}, gradient norm {norm}: update skipped ({bad_in_a_row} in a row)")
        if bad_in_a_row >= s.max_bad_steps:
            windows = batch_windows(s.seed, step, global_batch, train_data.n_windows).tolist()
            raise UserError(f"stopped at step {step} after {bad_in_a_row} steps in a row without a finite gradient; its windows: "
                            f"{windows[:8]}{'...' if len(windows) > 8 else ''}; --inspect_step={step} prints them")
        if not master:
            return
        record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
        if moe:
            balance, load = moe[0], torch.tensor(moe[1:]).view(model.config.n_layer, -1)
            fair = 1 / load.shape[1]
            starved = (starved + 1) * (load < 0.01 * fair)
            for layer, expert in (starved == 100).nonzero().tolist():
                say(f"warning: step {step}: expert {expert} of layer {layer} has had under 1 % of its fair share for 100 steps")
            entropy = -(load * load.clamp(min=1e-9).log()).sum(1) / math.log(load.shape[1])
            record |= {"balance_loss": balance, "load_min": (load.min() / fair).item(), "load_max": (load.max() / fair).item(),
                       "load_entropy": entropy.mean().item(), "load": [[round(x, 5) for x in row] for row in load.tolist()]}
        if step % s.log_interval == 0 or step == s.max_iters - 1 or not finite:
            now = time.perf_counter()
            rate = (step + 1 - clock_step) * tokens_per_step / max(now - clock, 1e-9)
            clock, clock_step = now, step + 1
            record |= {"tokens_per_s": rate, "mfu": rate * flops / (peak * world) if peak else None}
            left = (s.max_iters - step - 1) * tokens_per_step / rate
            say(f"step {step:>6}/{s.max_iters} · loss {loss:.4f} · lr {lr:.2e} · norm {norm:.2f} · {rate:,.0f} tok/s"
                + (f" · MFU {record['mfu']:.1%}" if peak else "") + (f" · load {record['load_min']:.2f}–{record['load_max']:.2f}" if moe else "")
                + f" · {int(left // 60)}:{int(left % 60):02d} left")
            metrics.write(record)
            if log_run:
                log_run.log({k: v for k, v in record.items() if k != "load"}, step=step)

    while True:
        # evaluate and save between steps; `step` counts the finished ones
        # `learned`: targets in the whole global batch of the coming step, before any of them is used
        learned, stopping = agree(sum((y >= 0).sum().item() for _, y in batches), len(stop), control)
        last = step >= s.max_iters or stopping > 0
        if pending and (last or s.eval_interval and step % s.eval_interval == 0 or s.checkpoint_interval and step % s.checkpoint_interval == 0):
            report(*pending)
            pending = None
        if s.eval_interval and (step % s.eval_interval == 0 or step >= s.max_iters):
            val_loss = evaluate()
            say(f"step {step:>6}/{s.max_iters} · validation loss {val_loss:.4f}")
            if master:
                metrics.write({"step": step, "val_loss": val_loss})
                if log_run:
                    log_run.log({"val_loss": val_loss}, step=step)
            if val_loss < best_val_loss:
                best_val_loss = val_loss
                if s.save_best and step > 0:
                    save(step, os.path.join(s.out_dir, "best.pt"), whole=False)
            clock, clock_step = time.perf_counter(), step
        if step > first_step and (last or s.checkpoint_interval and step % s.checkpoint_interval == 0):
            save(step, checkpoint.step_path(s.out_dir, step), whole=True)
            clock, clock_step = time.perf_counter(), step
        if last:
            break

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
                loss, moe = step_model(x, y, doc_mask=s.doc_mask)
            objective = loss * (world / max(learned, 1))          # DDP averages over processes, this makes it a sum
            if moe:
                objective = objective + s.aux_loss_weight * moe[0] * (world / s.gradient_accumulation_steps)
                balance, share = balance + moe[0].detach() / len(batches), share + moe[1] / len(batches)
            scaler.scale(objective).backward()
            loss_sum = loss_sum + loss.detach()
        if step + 1 < s.max_iters:
            batches = micro_batches(step + 1)        # read while the device is busy

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or float("inf"))
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            # AdamW's fused kernel leaves everything as it is where found_inf is 1: the host needn't ask.
            # The norm is of the summed gradient, so all processes skip together
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        numbers = torch.stack((loss_sum / max(learned, 1), norm))
        if moe:
            numbers = torch.cat((numbers, balance[None], share.flatten()))
        if world > 1:
            others = numbers * torch.tensor([1.0] + [1 / world] * (len(numbers) - 1), device=device)
            dist.all_reduce(others)
            numbers = others
        if pending:
            report(*pending)
        pending = ((step, lr), numbers)
        step += 1

    bar.close()
    if master:
        seconds = time.time() - started
        metrics.write({"step": step, "seconds": seconds, "tokens": (step - first_step) * tokens_per_step, "parameters": total, "active_parameters": active})
        say(f"{'stopped' if step < s.max_iters else 'done'} at step {step} after {seconds:.0f} s"
            + (f" · validation loss {val_loss:.4f}" if val_loss is not None else "") + f" · {s.out_dir}")
    if world > 1:
        dist.destroy_process_group()


def agree(learned, stop, control):
    """The sums over all processes of two host-side numbers: learned tokens, and signals to stop."""
    numbers = torch.tensor([learned, stop])
    if control is not None:
        dist.all_reduce(numbers, group=control)
    return numbers.tolist()


def write_config(s):
    """out_dir/config.py: every setting of this run, as a config file that train.py takes."""
    comments = field_comments(Settings)
    with open(os.path.join(s.out_dir, "config.py"), "w", encoding="utf-8") as file:
        for key, value in asdict(s).items():
            file.write(f"{key} = {value!r}  # {comments[key]}\n")


if __name__ == "__main__":
    run(main)
