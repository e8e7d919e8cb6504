"""Tiny training runs: their data, train.py in a forked process, killing it, comparing two.

A run of 60 tiny steps takes half a second.
"""
import hashlib
import json
import mmap
import os
import signal
import socket

import numpy as np
import torch

# train.py's first call into torch imports it, for most of a second in each child
import torch._inductor

import train
from minillm import checkpoint, validation
from support import processes
from support.tiny_tokenizer import VOCAB, make_tokenizer, tokenizer

BLOCK = 32
TINY = [f"--block_size={BLOCK}", "--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=32",
        "--batch_size=2", "--gradient_accumulation_steps=2", "--max_iters=60", "--warmup_iters=5",
        "--log_interval=1", "--eval_interval=20", "--eval_iters=3", "--checkpoint_interval=5",
        "--dropout=0.1", "--device=cpu", "--dtype=float32", "--optimizer=adamw",
        "--learning_rate=1e-2", "--min_lr=4e-4", "--schedule=cosine", "--beta1=0.9"]
MOE = ["--n_expert=4", "--n_expert_per_tok=2", "--n_inner=48"]
# 20 steps, with checkpoints of steps 5, 10, 15 and 20
SHORT = [*TINY, "--max_iters=20", "--eval_interval=10"]


def make_data(folder, kind="pretrain", train=4000, val=700, block_size=BLOCK, tokens=None,
              mask=None):
    """A folder of token files with a tokenizer beside it.

    tokens, mask: {"train": array, "val": array} in place of random ones.
    """
    folder = str(folder)
    make_tokenizer(os.path.join(folder, "tokenizer"))
    random = np.random.default_rng(5)
    splits = {}
    for split, count in (("train", train), ("val", val)):
        if kind == "sft":
            count = count // (block_size + 1) * (block_size + 1)
        # a token is often the one before plus one: there is something to learn
        ids = (np.cumsum(random.choice([1, 1, 1, 7, 31], count)) % (VOCAB - 3) + 3).astype("<u2")
        ids[random.random(count) < 0.02] = 0
        ids = np.asarray(tokens[split], "<u2") if tokens else ids
        ids.tofile(os.path.join(folder, f"{split}.bin"))
        splits[split] = {"documents": 10, "tokens": len(ids), "bytes": 3 * len(ids)}
        if kind == "sft":
            if mask:
                learned = np.asarray(mask[split], "u1")
            else:
                learned = (random.random(len(ids)) < 0.4).astype("u1")
            learned.tofile(os.path.join(folder, f"{split}_mask.bin"))
            count = int(learned.sum())
            splits[split] |= {"learned_tokens": count, "learned_bytes": 3 * count}
    meta = {"kind": kind, "tokenizer": os.path.join(folder, "tokenizer"),
            "tokenizer_hash": tokenizer().hash, "vocab_size": VOCAB, "seed": 1,
            "val_fraction": 0.1, "splits": splits, "sources": [], "skipped": {}}
    if kind == "sft":
        meta["block_size"] = block_size
    with open(os.path.join(folder, "meta.json"), "w") as file:
        json.dump(meta, file)
    return folder


def make_data_of_another_tokenizer(folder):
    """As make_data; its tokenizer.json ends with a line break more, and so has another hash."""
    folder = make_data(folder)
    with open(f"{folder}/tokenizer/tokenizer.json", "ab+") as file:
        file.write(b"\n")
        file.seek(0)
        new_hash = hashlib.sha256(file.read()).hexdigest()
    with open(f"{folder}/meta.json") as file:
        meta = json.load(file)
    meta["tokenizer_hash"] = new_hash
    with open(f"{folder}/meta.json", "w") as file:
        json.dump(meta, file)
    return folder


# what a child is doing, in one byte of shared memory
PHASES = ["start", "step", "between micro-steps", "optimizer", "checkpoint write", "evaluation",
          "end"]


class Run(processes.Fork):
    """train.py in a forked child whose phase the parent can see."""

    def __init__(self, argv, before=None, env=None):
        self.mark = mmap.mmap(-1, 1)
        super().__init__("train", argv, before, env)

    def prepare(self):
        """Wrap what marks the border of two phases; none of it changes what is computed."""
        mark = self.mark

        def enter(phase):
            if self.phase() == phase:
                return
            mark[0] = PHASES.index(phase)
            for action in _ON_PHASE:
                action(phase)

        def around(owner, name, phase, after):
            inner = getattr(owner, name)

            def wrapped(*args, **kwargs):
                enter(phase)
                result = inner(*args, **kwargs)
                enter(after)
                return result
            setattr(owner, name, wrapped)
        around(checkpoint, "save", "checkpoint write", "step")
        around(train, "learning_rate", "step", "step")
        around(torch.Tensor, "backward", "step", "between micro-steps")
        around(torch.nn.utils, "get_total_norm", "optimizer", "optimizer")
        around(validation, "permute", "evaluation", "evaluation")

    def phase(self):
        return PHASES[self.mark[0]]


def finish(argv, **options):
    """Run to the end; returns the output. Fails unless it exits 0."""
    return processes.finish("train", argv, **options)


def refused(argv, **options):
    """Run; returns the one line of the refusal.

    Fails unless it exits 2 with one line and no traceback.
    """
    return processes.refused("train", argv, **options)


def reserve_port():
    """A socket bound to a free port, which nobody else is given until it is closed.

    The system chooses, so that all programs of the machine agree, as two test runs at once must.
    The process of the job that listens there may bind the port, too: SO_REUSEADDR on both sides
    allows it while nobody listens.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def ranks(world, argv, before=None, env=None):
    """`world` children that form one gloo job, rank 0 first.

    before: a list of functions, one for each rank, or None.
    """
    reserved = reserve_port()
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(reserved.getsockname()[1])} | (env or {})
    before = before or [None] * world
    children = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(Run(argv, before[rank], common | own))
    children[0].port = reserved                  # held until the test lets the job go
    return children


def finish_ranks(world, argv, before=None):
    """A job of `world` processes to its end; returns what rank 0 printed. Fails unless all exit 0.

    before: as for ranks.
    """
    children = ranks(world, argv, before)
    statuses = [child.wait() for child in children]
    assert statuses == [0] * world, "\n".join(child.output for child in children)
    return children[0].output


_ON_PHASE = []                                   # what a child calls when it enters a phase


def on_phase(phase, time, action):
    """In the child: call action() when it enters `phase` for the given time, the first being 1."""
    entered = 0

    def count(now):
        nonlocal entered
        entered += now == phase
        if now == phase and entered == time:
            action()
    _ON_PHASE.append(count)


def on_step(action):
    """In the child: call action(step) when a step begins."""
    inner = train.learning_rate

    def learning_rate(s, step):
        action(step)
        return inner(s, step)
    train.learning_rate = learning_rate


def send_itself(number):
    """In the child: send itself the signal."""
    os.kill(os.getpid(), number)


def die_at(step):
    """In the child: SIGKILL when `step` begins."""
    def action(now):
        if now == step:
            send_itself(signal.SIGKILL)
    on_step(action)


def run_until_killed(argv, step, env=None):
    """Train until SIGKILL when `step` begins."""
    child = Run(argv, before=lambda: die_at(step), env=env)
    assert child.wait() == -signal.SIGKILL, child.output


def numbers(out_dir, drop=("tokens_per_s", "mfu")):
    """The records of all steps and validations in metrics.jsonl, without their speeds.

    The opening and the closing record are left out.
    """
    with open(os.path.join(out_dir, "metrics.jsonl")) as file:
        records = [json.loads(line) for line in file]
    kept = []
    for record in records:
        if "parameters" not in record:
            kept.append({key: value for key, value in record.items() if key not in drop})
    return kept


def keep_weights(path):
    """In the child: write the weights to `path` before every update, in the optimizer's order.

    The last ones stay.
    """
    inner = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        parameters = sum((group["params"] for group in optimizer.param_groups), [])
        torch.save([p.detach().clone() for p in parameters], path)
        return inner(optimizer, *args, **kwargs)
    torch.optim.AdamW.step = step


def newest(out_dir):
    return checkpoint.load(checkpoint.step_path(out_dir, checkpoint.saved_steps(out_dir)[0]))


def assert_same_weights(a, b):
    """Two state dicts hold the same bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_run(a, b):
    """Two finished runs logged the same numbers and end with the same bits.

    The bits of weights and optimizer state.
    """
    assert numbers(a) == numbers(b)
    x, y = newest(a), newest(b)
    assert x["step"] == y["step"]
    assert_same_weights(x["model"], y["model"])
    assert x["optimizer"].keys() == y["optimizer"].keys()
    for name, moments in x["optimizer"].items():
        assert_same_weights(moments, y["optimizer"][name])
    for key in ("scaler", "best_val_loss", "bad_steps"):
        assert x[key] == y[key], key
