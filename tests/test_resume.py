"""Exact resume: what a run needs to continue, and what it refuses to continue with.

That the bits are the same after any kill is in test_kills.py.
"""
import os
import shutil
import signal
from typing import NamedTuple

import pytest
import torch

from minillm import checkpoint, run_folder
from support.training_runs import (SHORT, TINY, Run, assert_same_run, assert_same_weights, finish,
                                   make_data, make_data_of_another_tokenizer, newest, numbers,
                                   on_phase, on_step, refused, run_until_killed, send_itself)


@pytest.fixture(scope="module")
def four_steps(data, tmp_path_factory):
    """(the arguments of a finished run of 4 steps, its folder); tests leave it as it is."""
    out = tmp_path_factory.mktemp("four_steps") / "out"
    argv = [*TINY, "--max_iters=4", f"--data_dir={data}", f"--out_dir={out}"]
    finish(argv)
    return argv, out


# ---- what a resumed run continues

def test_sigterm_ends_and_resume_is_exact_with_compile(data, tmp_path):
    """Compiled, in parts: stopped by a signal and resumed in a process that compiles anew."""
    argv = [*TINY, "--compile", "--n_layer=1", "--max_iters=12", "--eval_interval=0",
            f"--data_dir={data}"]
    lines = finish([*argv, f"--out_dir={tmp_path}/straight"]).splitlines()
    with_speed = [" tok/s" in line for line in lines if line.startswith("step ")]
    assert with_speed == [False] + 11 * [True]           # the first step was spent on compiling

    argv.append(f"--out_dir={tmp_path}/parted")
    child = Run(argv, before=lambda: on_phase("optimizer", 4, lambda: send_itself(signal.SIGTERM)))

    assert child.wait() == 0, child.output
    assert checkpoint.saved_steps(tmp_path / "parted") == [4]
    finish([*argv, "--init_from=resume"])
    assert_same_run(tmp_path / "straight", tmp_path / "parted")


def test_config_stays_where_resuming_trains_nothing(four_steps, tmp_path):
    argv, out = four_steps
    shutil.copytree(out, tmp_path / "out")
    argv = [*argv, f"--out_dir={tmp_path}/out", "--init_from=resume", "--learning_rate=0.5"]

    assert "done at step 4" in finish(argv)
    after_nothing = (tmp_path / "out/config.py").read_text()
    finish([*argv, "--max_iters=5"])

    assert after_nothing == (out / "config.py").read_text()
    assert run_folder.read_settings(tmp_path / "out")["learning_rate"] == 0.5


def test_steps_that_cannot_be_as_asked_are_named(four_steps, tmp_path):
    argv, out = four_steps
    shutil.copytree(out, tmp_path / "out")
    argv = [*argv, f"--out_dir={tmp_path}/out", "--init_from=resume"]

    assert "step 4, which is beyond them: nothing is left" in finish([*argv, "--max_iters=3"])
    output = finish([*argv, "--max_iters=5", "--warmup_iters=6"])
    assert "warmup_iters=6 is more than these steps: the learning rate stays under 0.01" in output
    assert "warmup_iters=5 is more" not in finish([*argv, "--max_iters=6"])
    output = finish([*argv, "--max_iters=7", "--learning_rate=1e-5"])
    assert "min_lr=0.0004 is above learning_rate=1e-05: it rises to that" in output


def test_a_new_run_removes_what_is_left_of_the_old_one(four_steps, tmp_path):
    argv, out = four_steps
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/eval.json").write_text("{}")

    finish([*argv, f"--out_dir={tmp_path}/out", "--init_from=resume", "--max_iters=5"])
    assert (tmp_path / "out/eval.json").exists() and (tmp_path / "out/best.pt").exists()
    (tmp_path / "out/tokenizer.tmp").mkdir()
    finish([*argv, f"--out_dir={tmp_path}/out", "--overwrite", "--save_best=False"])

    assert not {"eval.json", "best.pt", "tokenizer.tmp"} & set(os.listdir(tmp_path / "out"))


class Again(NamedTuple):
    name: str
    flags: list                            # of the command that continues
    first: dict = {}                       # environment of the run that is killed
    second: dict = {}                      # environment of the run that continues


JOB = {"TORCHELASTIC_RUN_ID": "job"}
AGAIN = [
    Again("resumed", ["--init_from=resume"]),
    Again("restarted", [], JOB, JOB | {"TORCHELASTIC_RESTART_COUNT": "1"}),
]


def test_sft_resumes_without_naming_the_shape(data, tmp_path):
    """SFT takes its shape from the pretrained folder.

    When it is resumed, also when torchrun restarts it, its shape comes from the checkpoint.
    """
    sft = make_data(tmp_path / "sft", kind="sft")
    finish([*TINY, "--max_iters=3", f"--data_dir={data}", f"--out_dir={tmp_path}/base"])
    argv = ["--block_size=32", "--batch_size=2", "--max_iters=8", "--eval_interval=0",
            "--log_interval=1", "--checkpoint_interval=4", "--doc_mask", "--device=cpu",
            f"--data_dir={sft}", f"--init_from={tmp_path}/base"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])

    for case in AGAIN:
        out = tmp_path / case.name
        run_until_killed([*argv, f"--out_dir={out}"], step=5, env=case.first)
        output = finish([*argv, *case.flags, f"--out_dir={out}"], env=case.second)

        assert "resuming at step 4" in output
        assert_same_run(tmp_path / "straight", out)
    assert run_folder.read_settings(tmp_path / "resumed")["init_from"] == f"{tmp_path}/base"
    line = refused([*argv, "--n_layer=4", f"--out_dir={tmp_path}/other"])
    assert "n_layer=2" in line and "4" in line
    assert not os.path.exists(tmp_path / "other")


def test_a_restart_does_not_roll_back_again(data, tmp_path):
    """torchrun repeats a command that rolls back to step 5, which is not kept for long."""
    argv = [*SHORT, f"--data_dir={data}"]
    finish([*argv, "--max_iters=10", f"--out_dir={tmp_path}/out"])
    rolled_back = [*argv, f"--out_dir={tmp_path}/out", "--init_from=resume", "--checkpoint=5"]
    run_until_killed(rolled_back, step=17, env=JOB)

    output = finish(rolled_back, env=JOB | {"TORCHELASTIC_RESTART_COUNT": "1"})

    assert "resuming at step 15" in output
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    assert_same_run(tmp_path / "straight", tmp_path / "out")


def test_new_settings_take_effect_on_resuming(data, tmp_path):
    """The flag wins over the weight decay that the optimizer has saved."""
    argv = [*TINY, "--max_iters=4", f"--data_dir={data}"]
    for name, decay in (("a", 0.1), ("b", 1.0)):
        out = f"--out_dir={tmp_path}/{name}"
        finish([*argv, out])
        finish([*argv, out, "--max_iters=6", "--init_from=resume", f"--weight_decay={decay}"])

    a, b = (newest(tmp_path / name)["model"]["wte.weight"] for name in "ab")
    assert not torch.equal(a, b)


def test_metrics_after_a_crash(data, tmp_path):
    """Half a line, garbage and records from after the checkpoint are dropped.

    Each repeated step has one record.
    """
    argv = [*TINY, "--max_iters=8", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    run_until_killed([*argv, f"--out_dir={tmp_path}/out"], step=7)
    with open(tmp_path / "out/metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe not json\n[1]\n{"loss": 1}\n{"step": 3, "lo')

    finish([*argv, "--init_from=resume", f"--out_dir={tmp_path}/out"])

    assert_same_run(tmp_path / "straight", tmp_path / "out")


def mapped_checkpoints():
    """The files of checkpoints that lie in this process's memory."""
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if ".pt" in line}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_is_mapped_while_it_is_loaded_and_not_longer(data, tmp_path, optimizer):
    """So all processes of a machine share it, and a file that is removed leaves the disk."""
    argv = [*TINY, "--max_iters=8", f"--optimizer={optimizer}", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    argv.append(f"--out_dir={tmp_path}/out")
    run_until_killed(argv, step=7)

    def before():
        inner = run_folder.open_resumed
        inherited = mapped_checkpoints()         # what other tests left in the parent's memory

        def open_resumed(*args):
            resumed = inner(*args)
            print("loaded:", mapped_checkpoints() - inherited)
            return resumed
        run_folder.open_resumed = open_resumed
        on_step(lambda step: print(f"step {step}:", mapped_checkpoints() - inherited))
    output = finish([*argv, "--init_from=resume"], before=before)

    assert f"loaded: {{'{checkpoint.step_path(tmp_path / 'out', 5)}'}}" in output
    assert "step 5: set()" in output and "step 7: set()" in output
    assert_same_run(tmp_path / "straight", tmp_path / "out")


def losses(out_dir):
    return [record for record in numbers(out_dir) if "loss" in record]


def test_a_finished_run_resumes_to_nothing_and_further(data, tmp_path):
    argv = [*TINY, "--max_iters=5", "--lr_decay_iters=8", f"--data_dir={data}"]
    again = [*argv, "--init_from=resume", f"--out_dir={tmp_path}/out"]
    finish([*argv, f"--out_dir={tmp_path}/out"])
    first = newest(tmp_path / "out")

    assert "done at step 5" in finish(again)
    assert_same_weights(first["model"], newest(tmp_path / "out")["model"])

    finish([*again, "--max_iters=8"])
    finish([*argv, "--max_iters=8", f"--out_dir={tmp_path}/straight"])
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")
    # the run's own config.py is a config file, and names the folder
    assert "done at step 8" in finish([f"{tmp_path}/out/config.py", "--init_from=resume"])


# ---- what it refuses

def test_a_restart_never_continues_another_job(data, tmp_path):
    """torchrun restarts after a refusal too: the second attempt is refused like the first."""
    argv = [*TINY, "--max_iters=2", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    path = checkpoint.step_path(tmp_path / "out", 2)
    finish(argv, env={"TORCHELASTIC_RUN_ID": "yesterday"})
    os.utime(path, (1e9, 1e9))                   # long ago: some file systems count in seconds

    for count in "01":
        today = {"TORCHELASTIC_RUN_ID": "today", "TORCHELASTIC_RESTART_COUNT": count}
        assert "already holds a run" in refused(argv, env=today)

    assert os.path.getmtime(path) == 1e9
    finish([*argv, "--overwrite"], env=today)
    assert os.path.getmtime(path) != 1e9


class Differs(NamedTuple):
    flags: list
    says: str


DIFFERS = [
    Differs(["--n_embd=64"], "n_embd=32"),
    Differs(["--n_expert=4"], "n_expert=0"),
    Differs(["--seed=7"], "seed 1337, now it is 7"),
    Differs(["--optimizer=muon"], "--optimizer=adamw resumes"),
    Differs(["--overwrite=True"], "--overwrite=True starts over: leave one of them out"),
    Differs(["--batch_size=4"], "windows in a step 4, now it is 8: put "),
]


@pytest.mark.parametrize("case", DIFFERS, ids=lambda case: " ".join(case.flags))
def test_what_differs_is_refused_by_name(four_steps, case):
    argv, _ = four_steps

    assert case.says in refused([*argv, "--init_from=resume", *case.flags])


def test_a_new_run_does_not_take_the_place_of_an_old_one(four_steps):
    argv, _ = four_steps

    assert "already holds a run at step 4" in refused(argv)


def test_other_data_are_refused_until_they_are_allowed(data, tmp_path):
    """What changed is reported then. Another tokenizer is never allowed."""
    argv = [*TINY, "--max_iters=4", f"--out_dir={tmp_path}/out"]
    finish([*argv, f"--data_dir={data}"])
    other = make_data(tmp_path / "other", train=5000)
    foreign = make_data_of_another_tokenizer(tmp_path / "foreign")
    again = [*argv, "--init_from=resume"]
    allowed = [*again, "--allow_other_data"]

    assert f"{other} is not what the checkpoint in" in refused([*again, f"--data_dir={other}"])
    assert (f"prepare the data with --tokenizer={tmp_path}/out/tokenizer"
            in refused([*allowed, f"--data_dir={foreign}"]))
    output = finish([*allowed, f"--data_dir={other}", "--seed=7", "--max_iters=6",
                     "--weight_decay=0.3"])

    assert ("changed since the checkpoint: seed 1337 → 7, max_iters 4 → 6, "
            "weight_decay 0.1 → 0.3") in output
    assert newest(tmp_path / "out")["step"] == 6


@pytest.mark.parametrize("what", ["the data", "block_size", "batch_size", "eval_iters", "doc_mask"])
def test_the_best_loss_does_not_outlive_its_validation_data(data, tmp_path, what):
    """Losses on other windows can't be compared: an old low one would keep best.pt for ever."""
    argv = [*TINY, f"--out_dir={tmp_path}/out", f"--data_dir={data}", "--learning_rate=0"]
    finish([*argv, "--max_iters=4", "--eval_interval=2"])
    path = checkpoint.step_path(tmp_path / "out", 4)
    checkpoint.save(path, torch.load(path, weights_only=True) | {"best_val_loss": 0.5})
    other = make_data(tmp_path / "other", train=5000)
    changes = {"the data": [f"--data_dir={other}"], "block_size": ["--block_size=16"],
               "batch_size": ["--batch_size=4", "--gradient_accumulation_steps=1"],
               "eval_iters": ["--eval_iters=2"], "doc_mask": ["--doc_mask"]}
    argv += ["--max_iters=6", "--eval_interval=2", "--init_from=resume", "--allow_other_data"]

    finish([*argv, *changes[what]])

    assert checkpoint.best_step(tmp_path / "out") == 4
    assert newest(tmp_path / "out")["best_val_loss"] > 0.5


def test_the_best_of_a_killed_future_is_set_aside(data, tmp_path):
    """best.pt of step 12, the newest checkpoint of 10: the resumed run may take another way."""
    argv = [*TINY, f"--out_dir={tmp_path}/out", f"--data_dir={data}", "--max_iters=20",
            "--eval_interval=3", "--checkpoint_interval=10"]
    run_until_killed(argv, 14)
    assert checkpoint.best_step(tmp_path / "out") == 12

    finish([*argv, "--init_from=resume", "--learning_rate=3"])

    losses = {r["step"]: r["val_loss"] for r in numbers(tmp_path / "out") if "val_loss" in r}
    best = checkpoint.best_step(tmp_path / "out")
    assert best >= 12 and losses[best] == min(loss for at, loss in losses.items() if at >= 12)


def test_a_setting_that_the_checkpoint_does_not_know_is_reported(data, tmp_path):
    """It is newer than the run: somebody has changed train.py meanwhile."""
    argv = [*TINY, "--max_iters=4", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish(argv)
    path = checkpoint.step_path(tmp_path / "out", 4)
    state = torch.load(path, weights_only=True)
    del state["settings"]["weight_decay"], state["settings"]["fp8"]
    checkpoint.save(path, state)

    output = finish([*argv, "--init_from=resume", "--max_iters=6"])

    assert ("changed since the checkpoint: max_iters 4 → 6, weight_decay 'not there' → 0.1\n"
            in output)
