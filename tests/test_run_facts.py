"""What a run says before its first step: where the data make few steps, how to get more of them."""
import re
from types import SimpleNamespace

import pytest
import torch

from minillm.run_facts import describe_run
from support.tiny_models import tiny_model
from train import Settings, count_steps

DATA = SimpleNamespace(tokens=range(14_240_702), n_windows=27_813)       # 14M tokens in windows of 512


def said(capsys, world=1, first_step=0, **settings):
    """(what is printed, the number of steps) for these settings and DATA."""
    s = Settings(**{"batch_size": 64, "max_iters": 0, "epochs": 2} | settings)
    s.steps = count_steps(s, DATA)
    device = torch.device("cpu")
    describe_run(s, tiny_model(), DATA, device, torch.float32, world, first_step)
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
