"""Exact resume.

A run that is killed, again and again and anywhere, ends with the bits of one that never was.
"""
import json
import os
import random
import subprocess
import time

import pytest
import torch

from minillm import checkpoint, run_folder
from support.training_runs import MOE, PHASES, PYTHON, ROOT, TINY, Run, assert_same_run, die_at, finish, make_data, newest, numbers, refused


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("resume") / "data")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("resume_sft") / "data", kind="sft")


def kill_and_resume(argv, straight, out_dir, kills, seed, duration):
    """Start, SIGKILL at a random moment, resume, SIGKILL ... until `kills` kills are done; then let
    it end.

    Half of the moments are a random time, half are drawn inside one phase, each phase in turn, so
    that the short ones have their share. A run that ends before its kill starts over in a fresh
    folder: its kills count, and its end is compared too. Returns ({phase: kills}, number of
    finished runs compared).
    """
    draw, hit, compared, round = random.Random(seed), dict.fromkeys(PHASES, 0), 0, 0
    phases = [phase for phase in PHASES if phase not in ("start", "end")]
    folder = f"{out_dir}_{round}"
    while True:
        resume = ["--init_from=resume"] if checkpoint.saved_steps(folder) else ["--overwrite=True"]
        child = Run([*argv, f"--out_dir={folder}", *resume])
        total = sum(hit.values())
        if total < kills:
            if total % 2 == 0:
                limit = time.monotonic() + draw.uniform(0.05, duration)
                while time.monotonic() < limit and child.status is None:
                    time.sleep(0.001)
                    child.poll()
            else:
                for _ in range(draw.randrange(1, 4)):        # not always the first of its kind
                    child.wait_for(phases[total // 2 % len(phases)])
                    time.sleep(draw.uniform(0, 0.004))
            if child.poll() is None:
                hit[child.phase()] += 1
                child.kill()
        if child.wait() == -9:
            continue
        assert child.status == 0, child.output
        assert_same_run(straight, folder)
        compared += 1
        if sum(hit.values()) >= kills:
            return hit, compared
        round += 1
        folder = f"{out_dir}_{round}"


@pytest.mark.parametrize("name, extra", [("dense", []), ("moe bf16", [*MOE, "--dtype=bfloat16"]), ("dense fp16", ["--dtype=float16"])])
def test_killed_runs_resume_exactly(data, tmp_path, name, extra):
    """Dropout, router noise, accumulation, the schedule, the loss scale.

    Six kills each, every bit the same in the end.
    """
    argv = [*TINY, *extra, f"--data_dir={data}", "--max_iters=40", "--eval_interval=10"]
    start = time.monotonic()
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    hit, _ = kill_and_resume(argv, f"{tmp_path}/straight", f"{tmp_path}/killed", 6, name, time.monotonic() - start)
    assert sum(hit.values()) == 6
    assert len(numbers(tmp_path / "straight")) == 45 and numbers(tmp_path / "straight")[0]["val_loss"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_battery_of_kills(data, tmp_path, kind, dtype, compile, capsys):
    """The long one: 24 kills of 60 steps for each of dense/MoE, float32/bf16, compile off/on.

    Prints its figures.
    """
    argv = [*TINY, *(MOE if kind == "moe" else []), f"--dtype={dtype}", f"--compile={compile}", f"--data_dir={data}"]
    # what is compiled once is found on disk later
    finish([*argv, f"--out_dir={tmp_path}/warm"])
    start = time.monotonic()
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    hit, compared = kill_and_resume(argv, f"{tmp_path}/straight", f"{tmp_path}/killed", 24, f"{kind} {dtype} {compile}", time.monotonic() - start)
    with capsys.disabled():
        print(f"\n{kind} {dtype} compile={compile}: {sum(hit.values())} kills ("
              + ", ".join(f"{count} in {phase}" for phase, count in hit.items() if count) + f"), {compared} runs finished, all bit-identical")


GPU = ["--n_layer=12", "--n_head=16", "--n_kv_head=8", "--n_embd=1024", "--block_size=512", "--vocab_size=32000", "--batch_size=32",
       "--gradient_accumulation_steps=2", "--dropout=0.1", "--learning_rate=6e-4", "--min_lr=6e-5", "--warmup_iters=10", "--max_iters=60", "--log_interval=1",
       "--eval_interval=20", "--eval_iters=5", "--checkpoint_interval=10", "--save_best=False", "--compile", "--deterministic"]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/nvidiactl"), reason="needs a GPU")
def test_kills_on_a_gpu(tmp_path, capsys):
    kill_processes(GPU, make_data(tmp_path / "data", train=2_000_000, val=100_000, block_size=512), tmp_path, 4, capsys)


def kill_processes(argv, data, folder, kills, capsys):
    """train.py as a user starts it.

    Killed after so many logged steps, drawn at random, `kills` times; then compared with a straight
    run.
    """
    command = [PYTHON, "train.py", *argv, f"--data_dir={data}"]
    subprocess.run([*command, f"--out_dir={folder}/straight"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    steps, draw, done = len(numbers(folder / "straight")), random.Random(1), []
    for moment in sorted(draw.sample(range(steps // 5, steps), kills)):
        resume = ["--init_from=resume"] if checkpoint.saved_steps(folder / "killed") else ["--overwrite"]
        child = subprocess.Popen([*command, *resume, f"--out_dir={folder}/killed"], cwd=ROOT, stdout=subprocess.DEVNULL)
        while child.poll() is None and (not os.path.exists(folder / "killed/metrics.jsonl") or len(whole_lines(folder / "killed")) < moment):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        child.kill()
        if child.wait() == -9:
            done.append(moment)
    subprocess.run([*command, "--init_from=resume", f"--out_dir={folder}/killed"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_same_run(folder / "straight", folder / "killed")
    with capsys.disabled():
        print(f"\n{len(done)} kills, after {', '.join(map(str, done))} of {steps} records: every loss, weight and moment bit-identical")
    assert done                                  # the last may come too late


def whole_lines(out_dir):
    with open(out_dir / "metrics.jsonl", "rb") as file:
        return [line for line in file if line.endswith(b"\n")]


def test_sigterm_ends_and_resume_is_exact_with_compile(data, tmp_path):
    """Compiled, in parts: stopped by a signal and resumed in a process that compiles anew."""
    argv = [*TINY, "--compile", "--n_layer=1", "--max_iters=12", "--eval_interval=0", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    child = Run([*argv, f"--out_dir={tmp_path}/parted"])
    child.wait_for("optimizer")
    child.kill(15)
    assert child.wait() == 0 and 1 <= checkpoint.saved_steps(tmp_path / "parted")[0] < 12
    finish([*argv, "--init_from=resume", f"--out_dir={tmp_path}/parted"])
    assert_same_run(tmp_path / "straight", tmp_path / "parted")


def test_sft_resumes_without_naming_the_shape(data, sft, tmp_path):
    """SFT takes its shape from the pretrained folder.

    So does its resumption, and torchrun's restart of it, from the checkpoint.
    """
    finish([*TINY, "--max_iters=3", f"--data_dir={data}", f"--out_dir={tmp_path}/base"])
    argv = ["--block_size=32", "--batch_size=2", "--max_iters=8", "--eval_interval=0", "--log_interval=1", "--checkpoint_interval=4", "--doc_mask",
            "--device=cpu", f"--data_dir={sft}", f"--init_from={tmp_path}/base"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    for name, again, env in (("resumed", ["--init_from=resume"], {}),
                             ("restarted", [], {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "job"})):
        child = Run([*argv, f"--out_dir={tmp_path}/{name}"], env={"TORCHELASTIC_RUN_ID": "job"} if env else {}, before=lambda: die_at(5))
        assert child.wait() == -9
        output = finish([*argv, *again, f"--out_dir={tmp_path}/{name}"], env=env)
        assert "resuming at step 4" in output
        assert_same_run(tmp_path / "straight", tmp_path / name)
    assert run_folder.read_settings(tmp_path / "resumed")["init_from"] == f"{tmp_path}/base"
    line = refused([*argv, "--n_layer=4", f"--out_dir={tmp_path}/other"])
    assert "n_layer=2" in line and "4" in line and not os.path.exists(tmp_path / "other")


def test_a_restart_never_goes_on_with_another_job(data, tmp_path):
    """torchrun restarts after a refusal too.

    The second attempt must be refused as the first was.
    """
    argv = [*TINY, "--max_iters=2", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish(argv, env={"TORCHELASTIC_RUN_ID": "yesterday"})
    for count in "01":
        assert "already holds a run" in refused(argv, env={"TORCHELASTIC_RUN_ID": "today", "TORCHELASTIC_RESTART_COUNT": count})
    before = os.path.getmtime(checkpoint.step_path(tmp_path / "out", 2))
    finish([*argv, "--overwrite"], env={"TORCHELASTIC_RUN_ID": "today", "TORCHELASTIC_RESTART_COUNT": "1"})
    assert os.path.getmtime(checkpoint.step_path(tmp_path / "out", 2)) != before


def test_what_differs_is_refused_by_name(data, tmp_path):
    argv = [*TINY, "--max_iters=4", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish(argv)
    again = [*argv, "--init_from=resume"]
    assert "already holds a run at step 4" in refused(argv)
    assert "n_embd=32" in refused([*again, "--n_embd=64"])
    assert "n_expert=0" in refused([*again, "--n_expert=4"])
    assert "seed 1337, now it is 7" in refused([*again, "--seed=7"])
    assert "windows in a step 4, now it is 8" in refused([*again, "--batch_size=4"])
    other = make_data(tmp_path / "other", train=5000)
    assert "trained with data" in refused([*again, f"--data_dir={other}"])
    assert "trained with tokenizer" in refused([*again, f"--data_dir={data_of_another_tokenizer(tmp_path)}", "--allow_other_data"])
    assert "changed since the checkpoint: seed 1337 → 7, max_iters 4 → 6, weight_decay 0.1 → 0.3" in \
        finish([*again, f"--data_dir={other}", "--allow_other_data", "--seed=7", "--max_iters=6", "--weight_decay=0.3"])
    assert newest(tmp_path / "out")["step"] == 6


def data_of_another_tokenizer(folder):
    other = make_data(folder / "other_tokenizer")
    with open(f"{other}/tokenizer/tokenizer.json", "a") as file:
        file.write(" ")
    with open(f"{other}/meta.json") as file:
        meta = json.load(file)
    import hashlib
    with open(f"{other}/tokenizer/tokenizer.json", "rb") as file:
        meta["tokenizer_hash"] = hashlib.sha256(file.read()).hexdigest()
    with open(f"{other}/meta.json", "w") as file:
        json.dump(meta, file)
    return other


def test_new_settings_take_effect_on_resuming(data, tmp_path):
    """The optimizer's own copy of its decay doesn't win over the flag.

    The weights differ from then on.
    """
    argv = [*TINY, "--max_iters=4", f"--data_dir={data}"]
    for name in "ab":
        finish([*argv, f"--out_dir={tmp_path}/{name}"])
    for name, decay in (("a", 0.1), ("b", 1.0)):
        finish([*argv, "--max_iters=6", "--init_from=resume", f"--weight_decay={decay}", f"--out_dir={tmp_path}/{name}"])
    assert not torch.equal(newest(tmp_path / "a")["model"]["wte.weight"], newest(tmp_path / "b")["model"]["wte.weight"])


def test_metrics_after_a_crash(data, tmp_path):
    """Half a line, garbage and records from after the checkpoint are dropped.

    What comes again stands there once.
    """
    argv = [*TINY, "--max_iters=8", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    child = Run([*argv, f"--out_dir={tmp_path}/out"], before=lambda: die_at(7))
    assert child.wait() == -9
    with open(tmp_path / "out/metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe not json\n[1]\n{"loss": 1}\n{"step": 3, "lo')
    finish([*argv, "--init_from=resume", f"--out_dir={tmp_path}/out"])
    assert_same_run(tmp_path / "straight", tmp_path / "out")


def test_a_finished_run_resumes_to_nothing_and_further(data, tmp_path):
    argv = [*TINY, "--max_iters=5", "--lr_decay_iters=8", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/out"])
    first = newest(tmp_path / "out")
    assert "done at step 5" in finish([*argv, "--init_from=resume", f"--out_dir={tmp_path}/out"])
    assert all(torch.equal(first["model"][name], value) for name, value in newest(tmp_path / "out")["model"].items())
    finish([*argv, "--init_from=resume", "--max_iters=8", f"--out_dir={tmp_path}/out"])
    finish([*argv, "--max_iters=8", f"--out_dir={tmp_path}/straight"])
    longer = [r for r in numbers(tmp_path / "out") if "loss" in r]
    assert longer == [r for r in numbers(tmp_path / "straight") if "loss" in r]
    # the run's own config.py is a config file: it goes on where the run is
    assert "done at step 8" in finish([f"{tmp_path}/out/config.py", "--init_from=resume"])
