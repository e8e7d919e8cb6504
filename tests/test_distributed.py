"""One step is one step, however it is cut: micro-steps and processes give the loss and gradients of
one big batch. A job whose process dies ends.

torchrun itself is in test_torchrun.py.
"""
import functools
import os
import socket
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from minillm.dataloader import TokenData, batch_windows, derive_seed, rank_batches
from minillm.validation import validation_loss
from model import GPT, GPTConfig
from support.training_runs import (BLOCK, MOE, TINY, assert_same_run, die_at, finish, finish_ranks,
                                   keep_weights, make_data, newest, numbers, ranks, reserve_port)

ROWS = 16                        # windows in a step


class Cut(NamedTuple):
    world: int                   # processes
    batch_size: int              # windows in a micro-step
    micro_steps: int             # over all processes


def masks(kind):
    """Which tokens of the 16 rows are learned, by the place of the row in the first batch."""
    learned = torch.zeros(ROWS, BLOCK + 1, dtype=torch.uint8)
    for place in range(ROWS):
        # 0, 2, 4 ... tokens: the first row has none, the second half most
        if kind == "uneven":
            learned[place, 1: 1 + 2 * place] = 1
        elif kind == "one rank has none" and place < 8:
            learned[place, 1: 6 + place] = 1
        elif kind == "one token in all" and place == 11:
            learned[place, 9] = 1
    rows = torch.empty_like(learned)
    rows[torch.from_numpy(batch_windows(1337, 0, ROWS, ROWS))] = learned
    return {"train": rows.flatten().numpy(), "val": rows.flatten().numpy()}


def sft_data(folder, mask):
    """SFT rows with these masks, {split: array}."""
    return make_data(folder, "sft", train=len(mask["train"]), val=len(mask["val"]), mask=mask)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with weights to start from."""
    folder = tmp_path_factory.mktemp("distributed")
    data = make_data(folder / "data")
    finish([*TINY, "--max_iters=3", "--dropout=0", f"--data_dir={data}",
            f"--out_dir={folder}/base"])
    return f"{folder}/base"


def keep_gradients(path):
    """In the child: write the gradients of the first step to `path`, before they are clipped."""
    inner = torch.nn.utils.get_total_norm

    def total_norm(gradients):
        if not os.path.exists(path):
            torch.save([gradient.clone() for gradient in gradients], path)
        return inner(gradients)
    torch.nn.utils.get_total_norm = total_norm


def train(cut, base, data, out, *flags, before=None):
    """Train from `base` in steps that are cut so. before: functions, one for each process."""
    argv = [f"--block_size={BLOCK}", f"--batch_size={cut.batch_size}", "--device=cpu",
            f"--gradient_accumulation_steps={cut.micro_steps}", "--log_interval=1",
            f"--data_dir={data}", f"--init_from={base}", f"--out_dir={out}", *flags]
    if cut.world > 1:
        finish_ranks(cut.world, argv, before)
    else:
        finish(argv, before=before and before[0])


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


CUTS = [Cut(1, 16, 1), Cut(1, 4, 4), Cut(2, 8, 2), Cut(2, 2, 8), Cut(4, 4, 4)]


@pytest.mark.parametrize("kind", ["uneven", "one rank has none", "one token in all"])
def test_any_cut_gives_loss_and_gradients_of_the_whole(base, tmp_path, kind):
    """Float32 against float64 of one big batch: within 1e-5, for the loss and every gradient."""
    data = sft_data(tmp_path / "data", masks(kind))
    runs = {cut: f"{tmp_path}/{number}" for number, cut in enumerate(CUTS)}
    kept = {cut: [f"{out}_gradients_{rank}" for rank in range(cut.world)]
            for cut, out in runs.items()}
    for cut, out in runs.items():
        train(cut, base, data, out, "--max_iters=1", "--eval_interval=0", "--doc_mask=False",
              "--dtype=float32",
              before=[functools.partial(keep_gradients, path) for path in kept[cut]])

    # after the runs: where torch knows GPUs, no process may fork after a backward pass
    loss, gradients = reference(base, data)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()

    for cut, out in runs.items():
        record = numbers(out)[0]
        assert record["loss"] == pytest.approx(loss, rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for path in kept[cut]:
            for found, wanted in zip(torch.load(path), gradients, strict=True):
                assert (found - wanted).norm() <= 1e-5 * wanted.norm(), (cut, path)


def test_experts_learn_their_load_balancing_loss_in_any_cut(tmp_path):
    """The mean over the micro-batches, each with the router noise of its place in the step."""
    data = make_data(tmp_path / "data")
    base, cuts = f"{tmp_path}/base", [Cut(1, 4, 4), Cut(2, 4, 4)]
    finish([*TINY, *MOE, "--dropout=0", "--max_iters=3", f"--data_dir={data}", f"--out_dir={base}"])
    for cut in cuts:
        train(cut, base, data, f"{tmp_path}/{cut.world}", "--max_iters=1", "--eval_interval=0",
              "--dtype=float32", "--aux_loss_weight=3",
              before=[functools.partial(keep_gradients, f"{tmp_path}/gradients_{cut.world}")] * 2)

    saved = newest(base)
    model = GPT(GPTConfig(**saved["model_config"])).train()
    model.load_state_dict(saved["model"])
    batches, n_supervised = rank_batches(TokenData(data, "train", BLOCK), 1337, 0, 4, 4, 0, 1)
    stats = []
    for place, (x, y) in enumerate(batches):
        torch.manual_seed(derive_seed(1337, 0, place))
        loss, (balance_loss, load) = model(x, y)
        (loss / n_supervised + 3 * balance_loss / len(batches)).backward()
        stats.append((balance_loss.item(), load))
    balance, load = zip(*stats)

    for cut in cuts:
        record = numbers(f"{tmp_path}/{cut.world}")[0]
        assert record["balance_loss"] == pytest.approx(np.mean(balance), rel=1e-4)
        torch.testing.assert_close(torch.tensor(record["load"]), torch.stack(load).mean(0),
                                   rtol=0, atol=1e-5)
        found = torch.load(f"{tmp_path}/gradients_{cut.world}")
        for gradient, p in zip(found, model.parameters(), strict=True):
            assert (gradient - p.grad).norm() <= 1e-4 * p.grad.norm(), cut


@pytest.mark.parametrize("cut", [Cut(1, 4, 4), Cut(2, 4, 4)])
def test_a_step_with_nothing_to_learn_is_no_nan(base, tmp_path, cut):
    """None of 16 windows has a learned token: loss 0, gradient 0, not counted as a bad step.

    The next step learns.
    """
    mask = torch.zeros(2 * ROWS, BLOCK + 1, dtype=torch.uint8)
    mask[torch.from_numpy(batch_windows(1337, 1, ROWS, 2 * ROWS)), 5:9] = 1
    mask = mask.flatten().numpy()
    data = sft_data(tmp_path / "data", {"train": mask, "val": mask})

    train(cut, base, data, tmp_path / "out", "--max_iters=2", "--eval_interval=0")

    nothing, something = numbers(tmp_path / "out")
    assert nothing["loss"] == nothing["grad_norm"] == nothing["skipped"] == 0
    assert 1 < something["loss"] < 10 and something["grad_norm"] > 0 and something["skipped"] == 0


def random_mask(rows):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(rows * (BLOCK + 1), generator=generator) < 0.2).to(torch.uint8).numpy()


def test_training_is_the_same_for_any_number_of_processes(base, tmp_path):
    """12 steps and 3 validations, over rows that no number of processes divides: to 1e-4."""
    data = sft_data(tmp_path / "data", {"train": random_mask(50), "val": random_mask(13)})
    steps, losses = [], []
    for cut in [Cut(1, 8, 1), Cut(2, 2, 4), Cut(4, 2, 4)]:
        out = tmp_path / str(cut.world)
        train(cut, base, data, out, "--max_iters=12", "--eval_interval=6", "--eval_iters=50",
              "--learning_rate=1e-3")
        steps.append([record["step"] for record in numbers(out)])
        losses.append([record.get("loss", record.get("val_loss")) for record in numbers(out)])

    assert len(steps[0]) == 15
    assert steps[0] == steps[1] == steps[2]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_bf16_and_experts_run_on_two_processes(tmp_path):
    """With router noise and load-balancing loss: both end with the same weights, and learn."""
    data = make_data(tmp_path / "data")
    argv = [*TINY, *MOE, "--dtype=bfloat16", "--max_iters=30", f"--data_dir={data}",
            f"--out_dir={tmp_path}/out"]
    kept = [f"{tmp_path}/weights_{rank}" for rank in range(2)]

    finish_ranks(2, argv, before=[functools.partial(keep_weights, path) for path in kept])

    for a, b in zip(*map(torch.load, kept), strict=True):
        assert torch.equal(a, b)
    records = [record for record in numbers(tmp_path / "out") if "loss" in record]
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    assert all(0 <= record["balance_loss"] < 3 for record in records)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others(tmp_path, victim):
    """SIGKILL of one rank at step 13: the other one ends too, and not with exit 0.

    Resuming is exact.
    """
    data = make_data(tmp_path / "data")
    argv = [*TINY, "--max_iters=30", f"--data_dir={data}"]
    finish_ranks(2, [*argv, f"--out_dir={tmp_path}/straight"])
    argv.append(f"--out_dir={tmp_path}/out")
    before = [None, None]
    before[victim] = lambda: die_at(13)

    children = ranks(2, argv, before)

    assert children[victim].wait() == -9
    assert children[1 - victim].wait() != 0, children[1 - victim].output
    assert "resuming at step 10" in finish_ranks(2, [*argv, "--init_from=resume"])
    assert_same_run(tmp_path / "straight", tmp_path / "out")


def test_three_processes_resume_exactly(tmp_path):
    """A sum of three numbers rounds by its order, which is that of DDP's buckets."""
    data = make_data(tmp_path / "data")
    argv = [*TINY, "--gradient_accumulation_steps=3", "--eval_interval=0", "--n_embd=64",
            "--n_layer=4", f"--data_dir={data}"]
    finish_ranks(3, [*argv, "--max_iters=12", f"--out_dir={tmp_path}/straight"])
    argv += ["--max_iters=12", f"--out_dir={tmp_path}/out"]
    children = ranks(3, argv, [lambda: die_at(7)] * 3)
    assert [child.wait() for child in children] == [-9] * 3

    assert "resuming at step 5" in finish_ranks(3, [*argv, "--init_from=resume"])

    assert_same_run(tmp_path / "straight", tmp_path / "out")


# ---- the tests' own jobs

def test_no_two_jobs_of_a_machine_get_the_same_port():
    """Neither another process of the tests, which may count as this one does, nor another program.

    Two jobs with one port take each other's processes for their own, and wait for ever.
    """
    begun, begin = os.pipe()
    answer, answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(begun, 1)
        os.write(answers, str(reserve_port().getsockname()[1]).encode())
        os._exit(0)

    with reserve_port() as mine:
        port = mine.getsockname()[1]
        os.write(begin, b"!")
        os.waitpid(pid, 0)

        assert int(os.read(answer, 100)) != port
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
    for end in (begun, begin, answer, answers):
        os.close(end)


# ---- validation

class TenWindows:
    n_windows = 10

    def windows(self, indices):
        x = torch.tensor([[int(i), int(i)] for i in indices])
        return x, x.clone()


def validate(rank, world, asked=False):
    """(batches that this rank computes, the [loss, tokens, cut short] that it adds, the loss)."""
    batches, added = [], []

    def forward(x, y):
        batches.append(x.shape)
        return (y * (y >= 0)).sum().float(), None

    def all_reduce(sums):
        added.append(sums.tolist())
        sums[1] += 1                             # the others have some: nobody is left with none
    s = SimpleNamespace(eval_iters=5, batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        loss = validation_loss(forward, TenWindows(), s, torch.device("cpu"), rank, world,
                               SimpleNamespace(asked=asked))
    return batches, added, loss


@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_all_ranks_validate_equally_often(world):
    """Also where the last round has windows for some of them alone; none counts twice."""
    _, _, loss = validate(0, 1)

    batches, added = zip(*[validate(rank, world)[:2] for rank in range(world)])

    assert all(shapes == [(2, 2)] * -(-5 // world) for shapes in batches)
    total, tokens, _ = np.sum([sums for sums, in added], axis=0)
    assert tokens == 20 and total / tokens == loss == 4.5


def test_a_rank_that_is_told_to_stop_says_so_to_the_others():
    """It meets them at the sum: otherwise they wait for it."""
    batches, added, loss = validate(1, 2, asked=True)

    assert batches == [] and added == [[0, 0, 1]] and loss is None
