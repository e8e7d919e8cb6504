"""The processes of one training job: rank and world size, joining, sums over all of them.

torchrun starts them and gives each its rank in environment variables; without it there is one.
"""
import contextlib
import os
import socket
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from minillm.errors import UserError, write_nowhere


def rank_and_world():
    """(rank, local rank, number of processes) that torchrun set; (0, 0, 1) without it.

    Raises UserError if only some of the variables are set: a container or a batch system may set
    WORLD_SIZE for itself.
    """
    rank = _number("RANK", 0)
    local_rank = _number("LOCAL_RANK", 0)
    world = _number("WORLD_SIZE", 1)
    if world > 1:
        for key in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(key):
                raise UserError(f"WORLD_SIZE={world} is set in the environment, but {key} is not: "
                                "start with torchrun, or unset WORLD_SIZE")
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} in the environment must be at least 0 and below "
                        f"WORLD_SIZE={world}: start with torchrun, or unset RANK")
    return rank, local_rank, world


def _number(key, default):
    text = os.environ.get(key, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"{key}={text!r} in the environment must be a whole number: "
                        "start with torchrun, or unset it")
    return int(text)


def launch_id():
    """A name for this launch of torchrun, the same after each of its restarts; None without it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


def join(device, rank, world):
    """Join the other processes. Returns a group for numbers on the host; None without others.

    The group has a backend of its own, so that summing such numbers needs no GPU sync.

    It also works after a restart by torchrun --max-restarts: the agent's store outlives its
    workers, and torch would read the addresses that the dead ones left in it. On one node the count
    of restarts tells the attempts apart. On several nodes it differs between them: launch with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (pytorch issue 135712).
    """
    if world == 1:
        return None
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return dist.new_group(backend="gloo")


def data_parallel(model, exchange=None):
    """The model in DDP: once its backward pass is done, gradients are means over the processes.

    exchange: a communication hook of DDP in place of its all-reduce.
    """
    # the same constant everywhere: not worth a broadcast per step
    model._ddp_params_and_buffers_to_ignore = ["rope"]
    # large buckets: each transfer takes multiprocessors from the matmuls that run beside it
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True,
                                                         bucket_cap_mb=250)
    if exchange:
        parallel.register_comm_hook(None, exchange)
    _settle_buckets(parallel)
    return parallel


def _settle_buckets(parallel):
    """Let DDP lay out its buckets before the first step, in an order that is always the same.

    It lays them out anew after its first backward pass, in the order in which the gradients came.
    The sum over three or more processes rounds by that layout, so the first step of a resumed run
    would have other bits than the same step of a run that never stopped.
    """
    model = parallel.module
    # gradients from the last parameter to the first, as in training: so sending overlaps as before
    model.forward = lambda: sum(p.sum() for p in model.parameters())
    for _ in range(2):                           # the second forward pass makes the new layout
        parallel().backward()
    del model.forward
    model.zero_grad()


def sum_over_ranks(group, *numbers):
    """The sums over all processes of some whole numbers on the host."""
    numbers = torch.tensor(numbers)
    if group is not None:
        dist.all_reduce(numbers, group=group)
    return numbers.tolist()


def gather_rows(state, device):
    """{name: {key: tensor}} of all ranks as one, on rank 0; {} on the others.

    Ranks that hold the same name and key hold rows of one tensor, in the order of the ranks. One
    tensor at a time is on its way. On the CPU, except for what rank 0 holds whole.
    """
    rank, held = dist.get_rank(), [None] * dist.get_world_size()
    own = {(name, key): tensor for name, tensors in state.items()
           for key, tensor in tensors.items() if tensor.numel()}
    dist.all_gather_object(held, {where: tensor.to("meta") for where, tensor in own.items()})
    rows = {}
    for source, tensors in enumerate(held):
        for where, like in tensors.items():
            tensor = own[where] if rank == source else torch.empty_like(like, device=device)
            if source > 0:
                dist.broadcast(tensor, source)
            if rank == 0:
                rows.setdefault(where, []).append(tensor.cpu() if source > 0 else tensor)
    whole = {}
    for (name, key), parts in rows.items():
        tensor = parts[0] if len(parts) == 1 else torch.cat([part.cpu() for part in parts])
        whole.setdefault(name, {})[key] = tensor
    return whole


def print0(text):
    """Print a line above the progress bar, on rank 0. A closed pipe or a full disk is ignored."""
    if int(os.environ.get("RANK") or 0) > 0:
        return
    try:
        tqdm.write(text)                         # errors.run() has each line written at once
    except BrokenPipeError:
        write_nowhere(1)
    except OSError:                              # the disk with the log is full
        pass


def warn0(text):
    """Print a line to stderr, on rank 0: stdout belongs to the answer. A closed one is ignored."""
    if int(os.environ.get("RANK") or 0) == 0:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
