"""The processes of one training job: which of them this is, how they meet, how they agree on a number.

torchrun starts them and tells each its place by environment variables; without it there is one.
"""
import os

import torch
import torch.distributed as dist


def rank_and_world():
    """(rank, local rank, number of processes) that torchrun set; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def join_job(backend, rank, world):
    """torch.distributed.init_process_group, which also works after a restart by torchrun --max-restarts.

    The agent's store outlives its workers, and torch would read the addresses that the dead ones left in it. On one
    node the count of restarts tells the attempts apart; on several it differs between them, and torch's own way out
    is to launch with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (pytorch issue 135712).
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def agree(control, *numbers):
    """The sums over all processes of some whole numbers on the host."""
    numbers = torch.tensor(numbers)
    if control is not None:
        dist.all_reduce(numbers, group=control)
    return numbers.tolist()
