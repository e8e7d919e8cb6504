"""The log of a run: which expert it warns of and when, what its records say."""
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


def records(log):
    """What the log has written of the steps, while its file is not open yet."""
    return [json.loads(line) for line in log.metrics.unwritten.splitlines()[1:]]


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
    # 1% of the fair share of four experts is 0.0025: the last one has more
    idle, even = [0.5, 0.001, 0.496, 0.003], [0.25] * 4
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


def test_a_record_says_how_evenly_the_experts_work(log):
    log_step(log, 0, [0.5, 0.25, 0.125, 0.125])

    record, = records(log)
    assert record["load_max"] == 2 and record["load_min"] == 0.5
    assert record["load_entropy"] == pytest.approx(1.75 / 2)
    assert record["load"] == [[0.5, 0.25, 0.125, 0.125]] * 2
    assert record["balance_loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss, norm", [(math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_a_step_that_is_not_finite_is_counted_and_shown(log, capsys, loss, norm):
    load = [0.25] * 8

    log.step(7, 0.1, torch.tensor([loss, norm, 0.0, *load]))
    log.step(8, 0.1, torch.tensor([1.0, 1.0, 0.0, *load]))

    record, = records(log)                       # although log_interval is 1000
    assert record["step"] == 7 and record["skipped"] == 1
    assert (log.bad_in_a_row, log.bad_in_all) == (0, 1)
    assert "not finite, update skipped (1 so far)" in capsys.readouterr().out


def test_the_last_step_is_logged_with_all_tokens_trained(log, capsys):
    for step in (998, 999):                      # log_interval is 1000
        log_step(log, step, [0.25] * 4)

    record, = records(log)
    assert record["step"] == 999 and record["tokens"] == 1000 * 48
    assert "step    999/1000" in capsys.readouterr().out
