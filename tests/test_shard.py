"""Every rank keeps a part of Muon's state, with --shard=True of AdamW's; nothing else changes.

Two runs "are the same" where they logged the same numbers and left the same bits.
"""
import functools
import json
import os
import shutil

import pytest
import torch

import train
from minillm import checkpoint
from minillm.optimizer import Optimizer
from support.training_runs import (MOE, SHORT, assert_same_run, assert_same_weights, die_at, finish,
                                   finish_ranks, newest, numbers, on_step, ranks)

MUON = ["--optimizer=muon", "--learning_rate=0.03", "--min_lr=0", "--schedule=linear"]
KINDS = {"Muon": MUON, "AdamW": [], "Muon and MoE": [*MUON, *MOE], "AdamW and MoE": MOE,
         "Muon in fp16": [*MUON, "--dtype=float16"], "Muon, clipped": [*MUON, "--grad_clip=0.01"]}
SHARD = "--shard=True"


def arguments(data, *flags, world=2):
    return [*SHORT, f"--gradient_accumulation_steps={max(world, 2)}", f"--data_dir={data}", *flags]


# ---- the same run

@pytest.mark.parametrize("kind, world", [*[(kind, 2) for kind in KINDS], ("Muon and MoE", 4)])
def test_shares_compute_what_the_whole_computes(data, tmp_path, kind, world):
    argv = arguments(data, *KINDS[kind], "--max_iters=8", "--eval_interval=4", world=world)
    finish_ranks(world, [*argv, f"--out_dir={tmp_path}/whole"])

    finish_ranks(world, [*argv, SHARD, f"--out_dir={tmp_path}/shares"])

    assert_same_run(tmp_path / "whole", tmp_path / "shares")


def test_one_process_says_that_it_keeps_everything(data, tmp_path):
    argv = arguments(data, *MUON, "--max_iters=4", "--eval_interval=0")
    finish([*argv, f"--out_dir={tmp_path}/whole"])

    output = finish([*argv, SHARD, f"--out_dir={tmp_path}/shares"])

    assert "shard=True changes nothing with one process" in output
    assert_same_run(tmp_path / "whole", tmp_path / "shares")


def poison(bad_step):
    """In the child: the loss of this step is NaN."""
    now = [-1]
    on_step(lambda step: now.__setitem__(0, step))
    inner = train.GPT.forward

    def forward(self, *args, **kwargs):
        loss, moe = inner(self, *args, **kwargs)
        return loss * (float("nan") if now[0] == bad_step else 1), moe
    train.GPT.forward = forward


class NoReading(torch.utils._python_dispatch.TorchDispatchMode):
    """Within it, a number that Python reads from a tensor is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def step_without_reading():
    """In the child: no update may read a number from a tensor, which on a GPU is a sync."""
    inner = Optimizer.step

    def step(self):
        with NoReading():
            inner(self)
    Optimizer.step = step


@pytest.mark.parametrize("kind", ["Muon and MoE", "AdamW"])
def test_a_bad_step_changes_nothing(data, tmp_path, kind):
    """One rank's loss is not finite at step 3; all skip it, and nobody asks the device."""
    argv = arguments(data, *KINDS[kind], "--checkpoint_interval=1", "--keep_checkpoints=99",
                     "--eval_interval=0", "--max_iters=6", SHARD, f"--out_dir={tmp_path}/out")

    def bad_rank():
        step_without_reading()
        poison(3)
    finish_ranks(2, argv, before=[step_without_reading, bad_rank])

    old, new, next_one = (checkpoint.load(checkpoint.step_path(tmp_path / "out", step))
                          for step in (3, 4, 5))
    assert_same_weights(old["model"], new["model"])
    assert not torch.equal(next_one["model"]["wte.weight"], new["model"]["wte.weight"])
    for name, moments in old["optimizer"].items():
        assert_same_weights(moments, new["optimizer"][name])
    assert numbers(tmp_path / "out")[-1]["skipped"] == 1


# ---- memory

def note_bytes(path):
    """In the child: write the bytes of each moment's storages to `path` when step 5 begins."""
    made, inner = [], train.make_optimizer

    def make_optimizer(*args):
        made.append(inner(*args))
        return made[0]
    train.make_optimizer = make_optimizer

    def action(step):
        if step == 5:
            with open(path, "w") as file:
                json.dump(bytes_by_moment(made[0]), file)
    on_step(action)


def bytes_by_moment(optimizer):
    """{name of a moment: bytes of its tensors}, of all that an optimizer reaches."""
    totals = {}
    for part in {*optimizer.parts, *optimizer.keepers}:
        for moments in part.state.values():
            for key, tensor in moments.items():
                totals[key] = totals.get(key, 0) + tensor.untyped_storage().nbytes()
    return totals


def bytes_of_ranks(world, argv, folder):
    paths = [f"{folder}/bytes_{rank}" for rank in range(world)]
    finish_ranks(world, argv, before=[functools.partial(note_bytes, path) for path in paths])
    return [json.loads(open(path).read()) for path in paths]


@pytest.mark.parametrize("world, resumed, shard", [(2, False, True), (4, False, True),
                                                   (2, True, True), (4, False, False)])
def test_every_rank_keeps_its_part_alone(data, tmp_path, world, resumed, shard):
    """Muon's momenta in equal parts; with shard AdamW's moments of a parameter on one rank."""
    argv = arguments(data, *MUON, *MOE, "--n_layer=4", "--max_iters=6", "--eval_interval=0",
                     "--checkpoint_interval=3", f"--out_dir={tmp_path}/out", world=world)
    if resumed:
        finish_ranks(world, [*argv, SHARD])
        os.remove(checkpoint.step_path(tmp_path / "out", 6))
        argv.append("--init_from=resume")
    else:
        argv.append("--overwrite=True")

    parts = bytes_of_ranks(world, [*argv, f"--shard={shard}"], tmp_path)

    whole, = bytes_of_ranks(1, [*argv[:-1], "--overwrite=True"], tmp_path)
    for part in parts:
        assert part["momentum"] == whole["momentum"] / world
        assert part["neuron"] == whole["neuron"]
    for key in ("exp_avg", "exp_avg_sq"):
        if not shard:
            assert all(part[key] == whole[key] for part in parts)
            continue
        assert sum(part.get(key, 0) for part in parts) == whole[key]
        assert max(part.get(key, 0) for part in parts) < whole[key]


# ---- checkpoints

def test_resuming_is_exact(data, tmp_path):
    """Killed at step 13, with the state in shares: as a run that was never interrupted."""
    argv = arguments(data, *MUON, *MOE, SHARD)
    finish_ranks(2, [*argv, f"--out_dir={tmp_path}/straight"])

    children = ranks(2, [*argv, f"--out_dir={tmp_path}/out"], [None, lambda: die_at(13)])
    assert [child.wait() for child in children][1] == -9
    output = finish_ranks(2, [*argv, f"--out_dir={tmp_path}/out", "--init_from=resume"])

    assert "resuming at step 10" in output
    assert_same_run(tmp_path / "straight", tmp_path / "out")


@pytest.mark.parametrize("kind, world", [("Muon and MoE", 1), ("Muon and MoE", 4), ("AdamW", 4)])
def test_any_number_of_processes_resumes(data, tmp_path, kind, world):
    """From shares of two: with shares or without, the same bits."""
    argv = arguments(data, *KINDS[kind], world=4)
    finish_ranks(2, [*argv, SHARD, "--max_iters=10", f"--out_dir={tmp_path}/whole"])
    shutil.copytree(tmp_path / "whole", tmp_path / "shares")
    argv.append("--init_from=resume")

    output = finish_ranks(world, [*argv, f"--out_dir={tmp_path}/whole"])
    finish_ranks(world, [*argv, SHARD, f"--out_dir={tmp_path}/shares"])

    assert "resuming at step 10" in output
    assert_same_run(tmp_path / "whole", tmp_path / "shares")
    assert newest(tmp_path / "shares")["step"] == 20


def test_a_state_that_does_not_fit_is_refused_by_every_rank(data, tmp_path):
    """A moment of one parameter lacks, which one rank alone would have loaded."""
    argv = arguments(data, *MUON, "--max_iters=10", f"--out_dir={tmp_path}/out", SHARD)
    finish_ranks(2, argv)
    path = checkpoint.step_path(tmp_path / "out", 10)
    state = torch.load(path)
    del state["optimizer"]["wte.weight"]["exp_avg"]
    torch.save(state, path)

    children = ranks(2, [*argv, "--max_iters=12", "--init_from=resume"])

    assert [child.wait() for child in children] == [2, 2]
    assert "exp_avg of wte.weight is missing" in children[0].output


def test_a_save_that_finds_no_room_is_survived(data, tmp_path):
    """Rank 0 cannot write at step 5: both go on, and the checkpoint of step 10 is whole."""
    argv = arguments(data, *MUON, SHARD, "--keep_checkpoints=9")
    finish_ranks(2, [*argv, f"--out_dir={tmp_path}/straight"])

    def before():
        inner = checkpoint.save

        def save(path, state):
            if path.endswith("00000005.pt"):
                raise OSError(28, "No space left on device")
            inner(path, state)
        checkpoint.save = save
    output = finish_ranks(2, [*argv, f"--out_dir={tmp_path}/out"], before=[before, None])

    assert output.count("could not save") == 1
    assert checkpoint.saved_steps(tmp_path / "out") == [20, 15, 10]
    assert_same_run(tmp_path / "straight", tmp_path / "out")
