"""The log of a run: its speed and what is left, which expert it warns of, what its records say."""
import io
import json
import math
import os
import re
import time
from types import SimpleNamespace

import pytest
import torch

import train
from minillm import checkpoint, run_folder, run_log
from minillm.run_log import RunLog, bad_steps_message
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


class Timed:
    """A log of 100 steps of 480 tokens on a clock that stands still but for them."""

    def __init__(self, monkeypatch, capsys, out_dir, resumed=None, world=1, **settings):
        self.now, self.capsys = 0.0, capsys
        monkeypatch.setattr(run_log.time, "perf_counter", lambda: self.now)
        s = Settings(out_dir=str(out_dir), block_size=48, log_interval=10, **settings)
        s.steps = 100
        self.model = tiny_model()
        self.log = RunLog(s, self.model, {"tokens_per_step": 480}, torch.device("cpu"), world,
                          resumed, writes=True)

    def lines(self, steps, seconds=2):
        """What the log prints of these steps, each of so many seconds."""
        for step in steps:
            self.now += seconds
            self.log.step(step, 0.1, torch.tensor([1.0, 1.0]))
        return self.capsys.readouterr().out.splitlines()


def ends(lines):
    """The last two parts of each line: the speed, and how long the rest will take."""
    return [line.split(" · ")[-2:] for line in lines]


@pytest.fixture
def timed(monkeypatch, capsys, tmp_path):
    return lambda **options: Timed(monkeypatch, capsys, tmp_path, **options)


def test_speed_and_the_time_that_is_left(timed):
    """240 tokens/s in every line, also in the first, and 2 s for each step that is to come."""
    run = timed()

    lines = run.lines(range(100))

    assert [line.split(" · ")[0] for line in lines] == [
        f"step {step:>6}/100" for step in (*range(0, 100, 10), 99)]
    left = ["3:18", "2:58", "2:38", "2:18", "1:58", "1:38", "1:18", "0:58", "0:38", "0:18", "0:00"]
    assert ends(lines) == [["240 tok/s", f"{time} left"] for time in left]
    assert [record["tokens_per_s"] for record in records(run.log)] == [240] * 11


def test_the_speed_is_that_since_the_line_before(timed):
    run = timed()
    run.lines(range(41), seconds=8)

    assert ends(run.lines(range(41, 60), seconds=1)) == [["480 tok/s", "0:49 left"]]


def test_a_resumed_run_times_its_own_steps(timed):
    run = timed(resumed={"step": 95})

    assert ends(run.lines(range(95, 100))) == [["240 tok/s", "0:00 left"]]


def test_a_first_step_that_was_compiled_is_not_timed(timed):
    run = timed(compile=True)

    first, second = run.lines(range(11))

    assert "tok/s" not in first and "left" not in first
    assert ends([second]) == [["240 tok/s", "2:58 left"]]
    assert [record["tokens_per_s"] for record in records(run.log)] == [None, 240]


def test_the_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch, timed):
    monkeypatch.setattr(run_log, "peak_flops", lambda device: 1e9)
    run = timed(world=4)

    [line] = run.lines(range(1))

    mfu = 240 * run.model.flops_per_token(48) / 4e9
    assert records(run.log)[0]["mfu"] == pytest.approx(mfu)
    assert f" · MFU {100 * mfu:.1f}% · " in line


def test_the_progress_bar_begins_where_the_run_does(monkeypatch, timed):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    run = timed(resumed={"step": 95})

    run.lines((95, 96))

    assert (run.log.bar.n, run.log.bar.total) == (97, 100)
    run.log.bar.close()


@pytest.mark.parametrize("first, step, says", [
    (None, 0, "stopped at step 0 after 7 s · nothing was written"),
    (None, 40, "stopped at step 40 after 7 s · --init_from=resume continues it"),
    (None, 100, "done at step 100 after 7 s"),
    ({"step": 90, "seconds": 60.0, "tokens": 5}, 100, "done at step 100 after 67 s"),
], ids=["at once", "on the way", "at the end", "after resuming"])
def test_the_last_line_is_of_the_whole_run(monkeypatch, timed, capsys, first, step, says):
    now = [1000.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    run = timed(resumed=first)
    now[0] += 7

    run.log.close(step)

    parts = capsys.readouterr().out.strip().split(" · ")
    assert " · ".join(part for part in parts if part != run.log.s.out_dir) == says
    last = json.loads(run.log.metrics.unwritten.splitlines()[-1])
    tokens = 5 + 10 * 480 if first else step * 480
    assert last == {"step": step, "seconds": 67 if first else 7, "tokens": tokens,
                    **run.log.parameters}


def test_a_validation_is_after_the_steps_that_are_done(timed):
    run = timed()

    run.log.validation(7, 1.5)

    assert records(run.log) == [{"step": 7, "val_loss": 1.5, "tokens": 7 * 480}]


def test_an_old_checkpoint_that_counts_no_tokens_has_trained_all_its_steps(timed):
    assert timed(resumed={"step": 95}).log.state(97)["tokens"] == 97 * 480


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


def test_records_are_on_the_disk_before_the_checkpoint_that_counts_them(data, tmp_path):
    """After a power cut the log would else have a gap."""
    def before():
        sync, save = os.fsync, checkpoint.save

        def fsync(number):
            if os.path.samestat(os.fstat(number), os.stat(tmp_path / "out/metrics.jsonl")):
                print("records")
            sync(number)

        def saved(path, state):
            print("checkpoint")
            save(path, state)
        os.fsync, checkpoint.save = fsync, saved

    output = finish([*TINY, "--max_iters=4", "--eval_interval=0", "--checkpoint_interval=2",
                     f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    order = [line for line in output.splitlines() if line in ("records", "checkpoint")]
    assert order == ["records", "checkpoint"] * 2


def test_a_record_says_how_evenly_the_experts_work(log, capsys):
    log_step(log, 0, [0.5, 0.25, 0.125, 0.125])

    record, = records(log)
    assert record["load_max"] == 2 and record["load_min"] == 0.5
    assert record["load_entropy"] == pytest.approx(1.75 / 2)
    assert record["load"] == [[0.5, 0.25, 0.125, 0.125]] * 2
    assert record["balance_loss"] == pytest.approx(math.log(2))
    assert "load 0.50–2.00" in capsys.readouterr().out


@pytest.mark.parametrize("loss, norm", [(math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_a_step_that_is_not_finite_is_counted_and_shown(log, capsys, loss, norm):
    load = [0.25] * 8

    log.step(7, 0.1, torch.tensor([loss, norm, 0.0, *load]))
    log.step(8, 0.1, torch.tensor([1.0, 1.0, 0.0, *load]))
    log.step(9, 0.1, torch.tensor([loss, norm, 0.0, *load]))

    first, second = records(log)                 # although log_interval is 1000
    assert (first["step"], first["skipped"]) == (7, 1)
    assert (second["step"], second["skipped"]) == (9, 2)
    assert (log.bad_in_a_row, log.bad_in_all) == (1, 2)
    assert "not finite, update skipped (2 so far)" in capsys.readouterr().out
    for key, value in (("loss", loss), ("grad_norm", norm)):     # JSON has no NaN
        assert first[key] == (value if math.isfinite(value) else None)


def test_the_first_record_says_how_large_the_model_is(log, timed):
    """A run that is resumed has said it."""
    first = json.loads(log.metrics.unwritten)

    total, active = tiny_model(n_expert=4).n_params()
    assert active < total
    assert first == {"step": 0, "parameters": total, "active_parameters": active}
    assert timed(resumed={"step": 40}).log.metrics.unwritten == b""


def test_trackers_get_the_numbers_of_a_record(log):
    """Not its lists, nor what is unknown."""
    got = []
    log.trackers = [SimpleNamespace(log=lambda values, step: got.append((step, values)))]

    log_step(log, 0, [0.25] * 4)

    [(step, values)] = got
    [record] = records(log)
    assert step == record["step"] == 0
    assert record.keys() - values.keys() == {"step", "load", "mfu"}
    assert values == {key: record[key] for key in values}


def test_the_last_step_is_logged_with_all_tokens_trained(log, capsys):
    for step in (998, 999):                      # log_interval is 1000
        log_step(log, step, [0.25] * 4)

    record, = records(log)
    assert record["step"] == 999 and record["tokens"] == 1000 * 48
    assert "step    999/1000" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size, dots", [(8, False), (9, True)])
def test_of_many_windows_the_first_eight_are_named(log, batch_size, dots):
    s = Settings(batch_size=batch_size)

    message = bad_steps_message(s, log, SimpleNamespace(n_windows=1000))

    windows, then = re.search(r"its windows: \[(.*?)\](.*?);", message).groups()
    assert len(windows.split(",")) == 8 and then == ("..." if dots else "")
