"""The log of a run: which expert it warns of, and when; what its speed counts."""
import json
import math
import time

import pytest
import torch

import train
from minillm import run_folder
from minillm.run_log import RunLog
from support.tiny_models import tiny_model
from support.training_runs import TINY, finish
from train import Settings


@pytest.fixture
def log(tmp_path):
    s = Settings(out_dir=str(tmp_path), block_size=48, log_interval=1000)
    s.steps = 1000
    facts = {"tokens_per_step": 48}
    return RunLog(s, tiny_model(n_expert=4), facts, torch.device("cpu"), 1, None, writes=True)


def log_step(log, step, load):
    """A step in which both layers of the tiny model have this load."""
    log.step(step, 0.1, torch.tensor([1.0, 1.0, math.log(2), *load, *load]))


def test_an_expert_without_work_is_named_after_100_steps_in_a_row(log, capsys):
    idle, even = [0.5, 0.001, 0.249, 0.25], [0.25] * 4
    for step in range(99):
        log_step(log, step, idle)
    log_step(log, 99, even)                      # counting begins anew
    for step in range(100, 199):
        log_step(log, step, idle)
    assert "warning" not in capsys.readouterr().out

    for step in range(199, 399):
        log_step(log, step, idle)

    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [
        f"warning: step 199: expert 1 of layer {layer} has had under 1% of its fair share for 100 "
        "steps" for layer in range(2)]


def test_what_evaluating_and_saving_take_does_not_count_as_training(data, tmp_path):
    """On a clock that stands still, but for 1,000 s in each validation and each checkpoint."""
    def before():
        now = [0.0]
        time.perf_counter = lambda: now[0]

        def takes_long(function):
            def call(*args, **options):
                now[0] += 1000
                return function(*args, **options)
            return call
        train.validation_loss = takes_long(train.validation_loss)
        run_folder.save = takes_long(run_folder.save)

    finish([*TINY, "--max_iters=8", "--eval_interval=3", "--checkpoint_interval=5",
            f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    assert len(speeds) == 8 and min(speeds) > 1e6
