"""One step is one step, however it is cut: micro-steps and processes give the loss and gradients of
one big batch.

And a job whose process dies ends, or under torchrun --max-restarts goes on exactly.
"""
import functools
import os
import signal
import subprocess
import time

import pytest
import torch

from minillm.dataloader import TokenData, batch_windows
from model import GPT, GPTConfig
from support.processes import LIMIT
from support.training_runs import BLOCK, PYTHON, ROOT, TINY, assert_same_run, die_at, finish, keep_weights, make_data, newest, numbers, ranks

ROWS = 16
# (processes, windows in a micro-step, micro-steps over all processes): always 16 windows a step
CUTS = [(1, 16, 1), (1, 4, 4), (2, 8, 2), (2, 2, 8), (4, 4, 4)]


def masks(kind):
    """Which tokens of the 16 rows are learned, by the place of the row in the first batch."""
    learned = torch.zeros(ROWS, BLOCK + 1, dtype=torch.uint8)
    for place in range(ROWS):
        # 0, 2, 4 ... tokens: the first row has none, the second half most
        if kind == "uneven":
            learned[place, 1: 1 + 2 * place] = 1
        elif kind == "one rank has none":
            learned[place, 1: 6 + place] = int(place < 8)
        elif kind == "one token in all":
            learned[place, 9] = int(place == 11)
    rows = torch.empty_like(learned)
    rows[torch.from_numpy(batch_windows(1337, 0, ROWS, ROWS))] = learned
    return {"train": rows.flatten().numpy(), "val": rows.flatten().numpy()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with weights to start from."""
    folder = tmp_path_factory.mktemp("distributed")
    data = make_data(folder / "data")
    finish([*TINY, "--max_iters=3", "--dropout=0", f"--data_dir={data}", f"--out_dir={folder}/base"])
    return f"{folder}/base"


def keep_gradients(path):
    """In the child: write down the gradients that the first step clips."""
    def before():
        inner = torch.nn.utils.get_total_norm

        def total_norm(gradients):
            if not os.path.exists(path):
                torch.save([gradient.clone() for gradient in gradients], path)
            return inner(gradients)
        torch.nn.utils.get_total_norm = total_norm
    return before


def train_as(world, argv, before):
    if world == 1:
        return finish(argv, before=before[0])
    children = ranks(world, argv, before=before)
    assert [child.wait() for child in children] == [0] * world, "\n".join(child.output for child in children)
    return children[0].output


def reference(base, data):
    """Loss and gradients of the whole first batch at once, in float64, written out by hand."""
    saved = newest(base)
    model = GPT(GPTConfig(**saved["model_config"])).double()
    model.load_state_dict(saved["model"])
    windows = TokenData(data, "train", BLOCK)
    x, y = windows.windows(batch_windows(1337, 0, ROWS, windows.n_windows))
    log_probability = model(x).log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    loss = -(log_probability * (y >= 0)).sum() / (y >= 0).sum()
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["uneven", "one rank has none", "one token in all"])
def test_any_cut_gives_loss_and_gradients_of_the_whole(base, tmp_path, kind):
    """Float32 against float64 of one big batch.

    Within 1e-5 of it, for loss and for the gradient of every parameter.
    """
    data = make_data(tmp_path / "data", "sft", train=ROWS * (BLOCK + 1), val=ROWS * (BLOCK + 1), mask=masks(kind))
    loss, gradients = reference(base, data)
    for world, batch_size, accumulation in CUTS:
        out = f"{tmp_path}/{world}_{batch_size}_{accumulation}"
        argv = [f"--block_size={BLOCK}", f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}", "--max_iters=1", "--log_interval=1",
                "--eval_interval=0", "--doc_mask=False", "--device=cpu", "--dtype=float32", f"--data_dir={data}", f"--init_from={base}", f"--out_dir={out}"]
        train_as(world, argv, [keep_gradients(f"{out}_gradients_{rank}") for rank in range(world)])
        record = numbers(out)[0]
        assert record["loss"] == pytest.approx(loss, rel=1e-5)
        assert record["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
        for rank in range(world):
            found = torch.load(f"{out}_gradients_{rank}")
            for a, b in zip(found, gradients, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm(), (world, batch_size, accumulation, rank)


def test_a_step_with_nothing_to_learn_is_no_nan(base, tmp_path):
    """None of 16 windows has a learned token: loss 0, gradient 0, nothing skipped.

    The next step learns.
    """
    mask = torch.zeros(2 * ROWS, BLOCK + 1, dtype=torch.uint8)
    mask[torch.from_numpy(batch_windows(1337, 1, ROWS, 2 * ROWS)), 5:9] = 1
    mask = mask.flatten().numpy()
    data = make_data(tmp_path / "data", "sft", train=len(mask), val=len(mask), mask={"train": mask, "val": mask})
    for world in (1, 2):
        argv = [f"--block_size={BLOCK}", "--batch_size=4", "--gradient_accumulation_steps=4", "--max_iters=2", "--log_interval=1", "--device=cpu",
                "--eval_interval=0", f"--data_dir={data}", f"--init_from={base}", f"--out_dir={tmp_path}/out_{world}"]
        train_as(world, argv, [None] * world)
        nothing, something = numbers(tmp_path / f"out_{world}")
        assert nothing["loss"] == 0 and nothing["grad_norm"] == 0 and nothing["skipped"] == 0
        assert 1 < something["loss"] < 10 and something["grad_norm"] > 0 and something["skipped"] == 0


def test_training_is_the_same_for_any_number_of_processes(base, tmp_path):
    """12 steps and 3 validations, over rows that no number of processes divides.

    The same losses to 1e-4.
    """
    mask = {split: (torch.rand(count * (BLOCK + 1), generator=torch.Generator().manual_seed(1)) < 0.2).to(torch.uint8).numpy()
            for split, count in (("train", 50), ("val", 13))}
    data = make_data(tmp_path / "data", "sft", train=50 * (BLOCK + 1), val=13 * (BLOCK + 1), mask=mask)
    results = []
    for world, batch_size, accumulation in ((1, 8, 1), (2, 2, 4), (4, 2, 4)):
        argv = [f"--block_size={BLOCK}", f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}", "--max_iters=12", "--log_interval=1",
                "--eval_interval=6", "--eval_iters=50", "--device=cpu", "--learning_rate=1e-3", f"--data_dir={data}", f"--init_from={base}",
                f"--out_dir={tmp_path}/{world}"]
        train_as(world, argv, [None] * world)
        results.append([(r["step"], r.get("loss", r.get("val_loss"))) for r in numbers(tmp_path / str(world))])
    assert len(results[0]) == 15
    for other in results[1:]:
        assert [step for step, _ in other] == [step for step, _ in results[0]]
        assert [loss for _, loss in other] == pytest.approx([loss for _, loss in results[0]], rel=1e-4)


def test_bf16_and_experts_run_on_two_processes(tmp_path):
    """Experts with noise and balance loss, bf16.

    Two processes agree on every weight at the end, and learn.
    """
    data = make_data(tmp_path / "data")
    argv = [*TINY, "--n_expert=4", "--n_expert_per_tok=2", "--n_inner=48", "--dtype=bfloat16", "--max_iters=30", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    children = ranks(2, argv, before=[functools.partial(keep_weights, f"{tmp_path}/weights_{rank}") for rank in range(2)])
    assert [child.wait() for child in children] == [0, 0], children[0].output
    a, b = (torch.load(f"{tmp_path}/weights_{rank}") for rank in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    losses = [r["loss"] for r in numbers(tmp_path / "out") if "loss" in r]
    assert losses[-1] < losses[0] - 0.3 and all(0 <= r["balance_loss"] < 3 for r in numbers(tmp_path / "out") if "loss" in r)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others(tmp_path, victim):
    """SIGKILL of one rank in the midst: the other leaves too, not with exit 0.

    Resuming is exact.
    """
    data = make_data(tmp_path / "data")
    argv = [*TINY, "--max_iters=30", f"--data_dir={data}"]
    train_as(2, [*argv, f"--out_dir={tmp_path}/straight"], [None, None])
    children = ranks(2, [*argv, f"--out_dir={tmp_path}/out"], before=[(lambda: die_at(13)) if rank == victim else None for rank in range(2)])
    assert children[victim].wait() == -9
    assert children[1 - victim].wait(LIMIT) not in (0, None), children[1 - victim].output
    resumed = ranks(2, [*argv, "--init_from=resume", f"--out_dir={tmp_path}/out"])
    assert [child.wait() for child in resumed] == [0, 0], resumed[0].output
    assert "resuming at step 10" in resumed[0].output
    assert_same_run(tmp_path / "straight", tmp_path / "out")


# ---- torchrun itself: it starts processes that import everything anew, so these take their time

def torchrun(*arguments, log):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def workers(launcher):
    """The processes of train.py below torchrun."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/cmdline") as cmdline:
                if int(stat.read().rsplit(")", 1)[1].split()[1]) == launcher.pid and "train.py" in cmdline.read():
                    found.append(int(name))
        except (OSError, IndexError):
            pass
    return sorted(found)


def wait_for_step(out_dir, step, launcher, log):
    limit = time.monotonic() + LIMIT
    while True:
        try:
            if max((r["step"] for r in numbers(out_dir)), default=0) >= step:
                return
        except (OSError, ValueError):
            pass
        assert time.monotonic() < limit and launcher.poll() is None, open(log).read()
        time.sleep(0.01)


def end(launcher):
    """Leave nothing running, however the test ended."""
    for pid in [*workers(launcher), launcher.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    launcher.wait()


def gone(pids):
    return not any(os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z" for pid in pids)


def test_torchrun_ends_when_a_worker_is_killed(tmp_path):
    data, log = make_data(tmp_path / "data"), tmp_path / "log"
    launcher = torchrun("train.py", *TINY, "--max_iters=100000", f"--data_dir={data}", f"--out_dir={tmp_path}/out", log=log)
    try:
        wait_for_step(tmp_path / "out", 12, launcher, log)
        both = workers(launcher)
        assert len(both) == 2
        os.kill(both[1], signal.SIGKILL)
        assert launcher.wait(LIMIT) != 0
        assert gone(both)
    finally:
        end(launcher)


DIES_ONCE = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train
from minillm.errors import run
from support.training_runs import die_at
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "0":
    die_at(22)
run(train.main)
"""


def test_torchrun_restarts_and_goes_on_exactly(tmp_path):
    data, log = make_data(tmp_path / "data"), tmp_path / "log"
    argv = [*TINY, "--max_iters=40", f"--data_dir={data}"]
    train_as(2, [*argv, f"--out_dir={tmp_path}/straight"], [None, None])
    script = tmp_path / "train.py"
    script.write_text(DIES_ONCE.format(root=ROOT))
    launcher = torchrun("--max-restarts=1", str(script), *argv, f"--out_dir={tmp_path}/out", log=log)
    try:
        assert launcher.wait(LIMIT) == 0, open(log).read()
    finally:
        end(launcher)
    assert "resuming at step 20" in open(log).read()
    assert_same_run(tmp_path / "straight", tmp_path / "out")
