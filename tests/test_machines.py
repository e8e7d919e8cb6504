"""The machines people have: devices and number types, environments, missing modules, trackers."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from minillm import device, run_log, trackers
from minillm.distributed import join, launch_id, print0
from minillm.errors import UserError
from minillm.muon import Muon
from support import ROOT
from support.training_runs import TINY, finish, newest, numbers, on_step, refused

SHORT = [*TINY, "--max_iters=6", "--eval_interval=3"]


# ---- devices

@pytest.mark.parametrize("cuda, mps, world, expected", [
    (0, False, 1, "cpu"), (0, True, 1, "mps"), (2, True, 1, "cuda:0"), (2, False, 2, "cuda:1"),
    (0, True, 2, "cpu"), (0, False, 2, "cpu")])
def test_auto_takes_what_is_there(monkeypatch, cuda, mps, world, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    assert str(device.pick_device("auto", local_rank=1, world=world)) == expected


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no Apple GPU"):
        device.pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="cannot be shared"):
        device.pick_device("mps", world=2)
    with pytest.raises(UserError, match="float16 is not supported on mps"):
        device.pick_dtype("float16", torch.device("mps"))
    assert device.pick_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bf16_units_takes_float16(monkeypatch, native, expected):
    """T4, V100 and RTX 20 emulate bfloat16, and say that they support it unless asked."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)

    assert device.pick_dtype("auto", torch.device("cuda", 0)) == expected


def without_cuda():
    """In the child: every call that only CUDA has fails, and so does pinned memory."""
    def forbidden(*args, **kwargs):
        raise AssertionError("a CUDA call on another device")
    for name in ("Event", "synchronize", "set_device", "get_device_name", "current_stream"):
        setattr(torch.cuda, name, forbidden)
    torch.Tensor.pin_memory = forbidden


def test_torch_knows_the_compiler_options_for_a_gpu():
    """They have names of their own in each version of torch. Nothing is compiled before a call."""
    linear = torch.nn.Linear(4, 4)
    device.compile_for_training(linear, torch.device("cuda"))
    Muon([{"params": [linear.weight]}], lr=0.1, compile=True)

    with pytest.raises(RuntimeError, match="unheard_of"):
        torch.compile(linear, options={"unheard_of": True})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_devices_meet_no_cuda_call(data, tmp_path, optimizer):
    finish([*SHORT, f"--optimizer={optimizer}", f"--data_dir={data}", f"--out_dir={tmp_path}/out"],
           before=without_cuda)

    assert newest(tmp_path / "out")["step"] == 6


def test_an_optimizer_that_asks_the_host_gives_the_same_weights(data, tmp_path):
    """What mps takes: no fused kernel, clipping and skipping by the host. Tried on the CPU."""
    def before():
        inner = torch.optim.AdamW

        def plain(groups, fused, **options):
            return inner(groups, fused=False, **options)
        torch.optim.AdamW = plain
        make = train.make_optimizer

        def asks(*args):
            optimizer = make(*args)
            optimizer.skips_on_host = True
            return optimizer
        train.make_optimizer = asks
    argv = [*SHORT, f"--data_dir={data}"]

    finish([*argv, f"--out_dir={tmp_path}/fused"])
    finish([*argv, f"--out_dir={tmp_path}/host"], before=before)

    fused, host = newest(tmp_path / "fused")["model"], newest(tmp_path / "host")["model"]
    for name, value in fused.items():
        torch.testing.assert_close(host[name], value, rtol=1e-4, atol=1e-5)


# ---- the environment

@pytest.mark.parametrize("env, says", [
    ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set in the environment, but RANK is not"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR is not"),
    ({"RANK": "1"}, "RANK=1 in the environment must be at least 0 and below WORLD_SIZE=1"),
    ({"RANK": " "}, "RANK=' ' in the environment must be a whole number"),
    ({"RANK": "one"}, "RANK='one' in the environment must be a whole number"),
])
def test_half_an_environment_is_one_line(data, tmp_path, env, says):
    assert says in refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], env=env)


@pytest.mark.parametrize("settings, says", [
    ({"gradient_accumulation_steps": 3}, "cannot be shared evenly by 2 processes: make it a mult"),
    ({"device": "cuda:1"}, "device=cuda:1 is one device for 2 processes: give --device=cuda"),
    ({"batch_size": 10**5, "gradient_accumulation_steps": 1002}, "more windows than one step can"),
    ({"checkpoint": "best"}, "checkpoint=best needs --init_from=DIR, or --init_from=resume"),
])
def test_settings_that_two_processes_cannot_follow(settings, says):
    two = {"gradient_accumulation_steps": 2}
    train.check(train.Settings(**two), world=2)
    train.check(train.Settings(gradient_accumulation_steps=3, device="cuda:1"), world=1)

    with pytest.raises(UserError, match=says):
        train.check(train.Settings(**two | settings), world=2)


@pytest.mark.parametrize("device, backend", [("cuda", "nccl"), ("cpu", "gloo")])
def test_numbers_on_the_host_have_a_backend_of_their_own(monkeypatch, device, backend):
    """NCCL takes none, and would wait for the GPU."""
    begun = []
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args: iter([("store", 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, **options: begun.append(backend))
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: f"a group of {backend}")

    assert join(torch.device(device), 0, 2) == "a group of gloo"
    assert begun == [backend]


@pytest.mark.parametrize("rank, local_rank, said", [
    ("0", "0", "x\n"), ("8", "0", ""), ("", "", "x\n")])
def test_one_process_of_all_machines_speaks(monkeypatch, capsys, rank, local_rank, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    print0("x")

    assert capsys.readouterr().out == said


def test_launches_of_torchrun_without_a_name_are_told_apart(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch_id() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a name")
    assert launch_id() == "a name"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")        # what torchrun sets without --rdzv_id
    assert launch_id().endswith(f":{os.getppid()}")


def test_an_empty_rank_is_none(data, tmp_path):
    empty = {"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": "", "TORCHELASTIC_RESTART_COUNT": ""}

    finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], env=empty)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(data, tmp_path, closed):
    """The files that it writes don't take their place, and nothing is written into them."""
    flags = " ".join([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"])

    status = subprocess.run(["bash", "-c", f"{sys.executable} train.py {flags} {closed}"], cwd=ROOT,
                            capture_output=True).returncode

    assert status == 0
    assert newest(tmp_path / "out")["step"] == 6 and numbers(tmp_path / "out")[-1]["step"] == 6


def test_a_clock_that_is_set_back(data, tmp_path):
    def before():
        then = iter(range(10**9, 0, -1000))
        run_log.time.time = lambda: next(then)

    finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    assert newest(tmp_path / "out")["seconds"] >= 0


def test_training_without_what_windows_lacks(data, tmp_path):
    """fcntl, resource, termios and readline do not exist there, and folders cannot be opened."""
    code = ("import os, shutil, sys\n"
            "shutil._use_fd_functions = False\n"          # as it is there
            "for name in ('fcntl', 'resource', 'termios', 'readline'): sys.modules[name] = None\n"
            "inner = os.open\n"
            "def opened(path, *args, **kwargs):\n"
            "    if os.path.isdir(path): raise PermissionError(13, 'Permission denied')\n"
            "    return inner(path, *args, **kwargs)\n"
            "os.open = opened\n"
            "import train; from minillm.errors import run; run(train.main)")
    command = [sys.executable, "-c", code, *SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/a"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert newest(tmp_path / "a")["step"] == 6


# ---- what a run says

@pytest.mark.parametrize("seconds, text", [(5, "0:05"), (3725, "1:02:05"), (0, "0:00"),
                                           (2 * 86400 + 3 * 3600 + 65, "2d 03:01:05")])
def test_durations(seconds, text):
    assert run_log.duration(seconds) == text


def test_ctrl_c_is_answered_at_once(data, tmp_path):
    def before():
        on_step(lambda step: os.kill(os.getpid(), 2) if step == 2 else None)

    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    assert "SIGINT: finishing this step, then saving; Ctrl-C again leaves at once" in output
    assert "stopped at step 3" in output
    assert "validation loss" in output and "at step 0 · " in output


# ---- trackers

def spec_of(name):
    """What find_spec gives for a package that is installed."""
    return SimpleNamespace(origin=name)


class FakeTracker:
    name, advice, logged = "wandb", "run `wandb login`, or ", []

    def __init__(self, s, run_id, config, step):
        self.id = run_id or "new id"
        print(f"config {json.dumps(config)}\ntracker {self.id} from {step}")

    def log(self, values, step):
        print(f"logged {step} {sorted(values)}")

    def close(self):
        print("closed")


def test_a_tracker_gets_every_record_and_the_run_that_goes_on(data, tmp_path):
    def before():
        trackers.TRACKERS["wandb"] = FakeTracker
        trackers.importlib = SimpleNamespace(util=SimpleNamespace(find_spec=spec_of))
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--wandb_log"]

    first = finish([*argv, "--max_iters=3"], before=before)
    second = finish([*argv, "--tracker=wandb", "--init_from=resume"], before=before)

    config = json.loads(next(x for x in first.splitlines() if x.startswith("config "))[7:])
    assert config["n_embd"] == 32 and config["steps"] == 3 and config["parameters"] > 0
    assert "tracker new id from 0" in first and "closed" in first
    assert "tracker new id from 3" in second
    steps = [step for step in range(6) if f"logged {step} ['grad_norm'" in second]
    assert steps == [3, 4, 5]


def test_a_tracker_that_cannot_start_is_one_line(data, tmp_path):
    def before():
        def broken(*args):
            raise RuntimeError("api_key not configured (no-tty).\nmore")
        broken.advice = FakeTracker.advice
        trackers.TRACKERS["wandb"] = broken
        trackers.importlib = SimpleNamespace(util=SimpleNamespace(find_spec=spec_of))

    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--tracker=wandb"],
                   before=before)

    assert "tracker=wandb cannot start: api_key not configured (no-tty). more; run `wandb" in line


@pytest.mark.parametrize("run", [SimpleNamespace(id="r1"),
                                 SimpleNamespace(public=SimpleNamespace(run_id="r1"))],
                         ids=["swanlab 0.10", "before"])
def test_swanlab_tells_the_id_by_which_a_run_resumes(monkeypatch, run):
    asked = []
    fake = SimpleNamespace(init=lambda **options: asked.append(options) or run)
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    settings = SimpleNamespace(wandb_project="p", wandb_run_name="", out_dir="out/a")

    first = trackers.SwanLab(settings, None, {}, 0)
    trackers.SwanLab(settings, first.id, {}, 4)

    assert [(options["id"], options["resume"]) for options in asked] == [(None, "allow"),
                                                                        ("r1", "allow")]
    assert asked[0]["experiment_name"] == "out/a"


def test_an_unknown_tracker_is_named(data, tmp_path):
    line = refused([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--tracker=mlflow"])

    assert "tracker='mlflow' is not one of tensorboard, wandb, swanlab" in line


def test_tensorboard_has_no_gap_and_no_double(data, tmp_path):
    """Killed and resumed: the steps of the events, without those that a resume hides."""
    pytest.importorskip("tensorboard")
    # an optional package
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out", "--tracker=tensorboard"]
    finish([*argv, "--max_iters=4"])
    finish([*argv, "--init_from=resume"])

    events = EventAccumulator(f"{tmp_path}/out/tensorboard").Reload()

    assert [event.step for event in events.Scalars("loss")] == list(range(6))
