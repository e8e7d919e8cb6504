"""What a run says before its first step: its size and length, and what was perhaps not meant."""
import re
from types import SimpleNamespace

import pytest
import torch

from minillm.run_facts import describe_run
from support.tiny_models import tiny_model
from train import Settings, count_steps

DATA = SimpleNamespace(tokens=range(14_240_702), n_windows=27_813)       # 14M tokens in windows of 512


def said(capsys, world=1, first_step=0, n_expert=0, **settings):
    """(what is printed, the number of steps) for these settings and DATA."""
    s = Settings(**{"batch_size": 64, "max_iters": 0, "epochs": 2} | settings)
    s.steps = count_steps(s, DATA)
    device = torch.device("cpu")
    describe_run(s, tiny_model(n_expert), DATA, device, torch.float32, world, first_step)
    return capsys.readouterr().out, s.steps


@pytest.mark.parametrize("epochs, world", [(2, 1), (2, 2), (5, 1), (9, 2), (30, 4)])
def test_few_steps_are_told_which_settings_make_more(epochs, world, capsys):
    before = {"epochs": epochs, "gradient_accumulation_steps": 16, "warmup_iters": 500}
    output, steps = said(capsys, world, **before)

    flags = dict(re.findall(r"--(\w+)=(\d+)", output))
    promised = int(re.search(r"makes ([\d,]+) smaller", output)[1].replace(",", ""))
    after = {key: int(value) for key, value in flags.items()}
    output, more = said(capsys, world, **before | after)

    assert after["gradient_accumulation_steps"] % world == 0
    assert promised == more > steps
    assert "few steps" not in output and "warmup_iters" not in output
    assert more > 1000 or after["gradient_accumulation_steps"] == world


@pytest.mark.parametrize("settings", [
    {"gradient_accumulation_steps": 1},                          # already as small as they get
    {"gradient_accumulation_steps": 8, "epochs": 20},            # many
    {"gradient_accumulation_steps": 8, "max_iters": 5},          # as few as were asked for
    {"gradient_accumulation_steps": 8, "max_iters": 500},        # more would end there
    {"gradient_accumulation_steps": 8, "first_step": 5},         # a resumed run keeps its batch
])
def test_runs_that_cannot_or_need_not_have_more_steps(settings, capsys):
    assert "few steps" not in said(capsys, **settings)[0]


def test_size_and_length_of_the_run(capsys):
    settings = {"gradient_accumulation_steps": 4, "max_iters": 100, "epochs": 0}
    total, active = tiny_model(n_expert=4).n_params()

    dense, _ = said(capsys, **settings)
    moe, _ = said(capsys, world=2, first_step=7, n_expert=4, **settings)

    assert f"float32, 1 process · {tiny_model().n_params()[0]:,} parameters\n" in dense
    length = "14,240,702 tokens, 27,813 windows · 100 steps of 256 windows, 0.92 epochs"
    assert dense.endswith(length + "\n")
    assert f"2 processes · {total:,} parameters, {active:,} active per token\n" in moe
    assert moe.endswith(length + " · resuming at step 7\n")


@pytest.mark.parametrize("settings, says", [
    ({"warmup_iters": 101}, "warmup_iters=101 is more than these steps"),
    ({"warmup_iters": 100}, None),
    ({"first_step": 101}, "beyond them: nothing is left to train"),
    ({"first_step": 100}, None),
    ({"min_lr": 0.05}, "min_lr=0.05 is above learning_rate=0.04"),
    ({"min_lr": 0.04}, None),
    ({"shard": True}, "shard=True changes nothing with one process"),
    ({"shard": True, "world": 2}, None),
])
def test_what_was_perhaps_not_meant(settings, says, capsys):
    usual, _ = said(capsys, max_iters=100)

    output, _ = said(capsys, max_iters=100, **settings)

    if says:
        assert says in output
    else:
        assert output.count("\n") == usual.count("\n")
        assert "beyond" not in output
