"""The schedules; and runs with Muon: resumed, on several ranks, through a bad step."""
from types import SimpleNamespace

import pytest
import torch

import train
from minillm import checkpoint, muon
from minillm.muon import Muon
from support.training_runs import (MOE, TINY, Run, assert_same_run, die_at, finish, newest, numbers,
                                   on_step, ranks, refused)

MUON = ["--optimizer=muon", "--learning_rate=0.03", "--min_lr=0", "--schedule=linear"]


# ---- the schedule

def schedule(**changes):
    defaults = dict(learning_rate=1.0, min_lr=0.0, warmup_iters=10, schedule="cosine", steps=110,
                    lr_decay_iters=0, decay_lr=True, decay_share=0.5)
    s = SimpleNamespace(**defaults | changes)
    return [train.learning_rate(s, step) for step in range(s.steps)]


def test_schedules():
    cosine, linear = schedule(), schedule(schedule="linear", decay_share=0.2)
    constant = schedule(schedule="constant")

    for rates in (cosine, linear, constant):
        assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert cosine[60] == pytest.approx(0.5) and cosine[-1] < 0.001
    assert linear[10:88] == [1.0] * 78
    assert linear[99] == pytest.approx(11 / 22) and linear[109] == pytest.approx(1 / 22)
    assert constant[10:] == [1.0] * 100 == schedule(decay_lr=False)[10:]


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_a_long_warm_up_ends_where_it_meets_the_falling_rate(share):
    """config/pretrain.py warms up for 500 steps, which a short run must not follow with a cliff."""
    rates = schedule(schedule="linear", decay_share=share, warmup_iters=60)

    top = rates.index(max(rates))
    assert rates[:top] == [(step + 1) / 60 for step in range(top)]
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.02


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_after_lr_decay_iters_the_rate_stays_at_min_lr(kind):
    rates = schedule(schedule=kind, lr_decay_iters=60, min_lr=0.1)

    assert rates[59] > 0.1 and rates[60:] == pytest.approx([0.1] * 50)


# ---- in a run

@pytest.mark.parametrize("extra", [[], MOE, ["--dtype=float16"]], ids=["dense", "moe", "fp16"])
def test_muon_resumes_to_the_bit(data, tmp_path, extra):
    """Killed at step 13, resumed from step 10 by a command that does not name the optimizer."""
    argv = [*TINY, *MUON, *extra, "--max_iters=20", "--eval_interval=0", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])

    child = Run([*argv, f"--out_dir={tmp_path}/out"], before=lambda: die_at(13))
    assert child.wait() == -9
    again = [flag for flag in argv if not flag.startswith("--optimizer=")]
    finish([*again, "--init_from=resume", f"--out_dir={tmp_path}/out"])

    assert_same_run(tmp_path / "straight", tmp_path / "out")
    moments = newest(tmp_path / "out")["optimizer"]["blocks.0.attn.qkv.weight"]
    assert sorted(moments) == ["momentum", "neuron"]


def test_ranks_share_the_work_and_agree(data, tmp_path):
    argv = [*TINY, *MUON, "--max_iters=6", "--eval_interval=0", "--dropout=0",
            "--gradient_accumulation_steps=4", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/one"])
    shares = [f"{tmp_path}/share_{rank}" for rank in range(4)]
    for path in shares:
        open(path, "w").close()

    def note_share(path):
        def before():
            inner = Muon._start

            def start(self, group, params):
                look_ahead = self._look_ahead

                def noted(grads, momenta, outs, *rest):
                    with open(path, "a") as file:
                        file.writelines(f"{len(out)}\n" for out in outs)
                    return look_ahead(grads, momenta, outs, *rest)
                self._look_ahead = noted
                finish = inner(self, group, params)
                self._look_ahead = look_ahead
                return finish
            Muon._start = start
            gather = muon._all_gather

            def demanding(whole, part, **options):
                assert part.is_contiguous()      # nccl demands it, gloo doesn't
                return gather(whole, part, **options)
            muon._all_gather = demanding
        return before

    children = ranks(4, [*argv, f"--out_dir={tmp_path}/four"], before=list(map(note_share, shares)))
    assert [child.wait() for child in children] == [0] * 4, children[0].output

    one, four = newest(tmp_path / "one"), newest(tmp_path / "four")
    for name, value in one["model"].items():
        torch.testing.assert_close(four["model"][name], value, rtol=1e-3, atol=1e-4)
    # two layers: of every shape two matrices, so two of the ranks have one each, two have none
    assert [sum(map(int, open(path).read().split())) for path in shares] == [24, 24, 0, 0]


def test_a_bad_step_of_muon_is_skipped(data, tmp_path):
    """The run's own path: a loss that is not finite at step 3, a checkpoint after every step."""
    def before():
        now = [-1]
        on_step(lambda step: now.__setitem__(0, step))
        inner = train.GPT.forward

        def forward(self, *args, **kwargs):
            loss, moe = inner(self, *args, **kwargs)
            return loss * (float("nan") if now[0] == 3 else 1), moe
        train.GPT.forward = forward

    finish([*TINY, *MUON, "--checkpoint_interval=1", "--keep_checkpoints=99", "--eval_interval=0",
            "--max_iters=6", f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    old, new = (checkpoint.load(checkpoint.step_path(tmp_path / "out", step)) for step in (3, 4))
    assert all(torch.equal(value, new["model"][name]) for name, value in old["model"].items())
    for name, moments in old["optimizer"].items():
        for key, value in moments.items():
            assert torch.equal(value, new["optimizer"][name][key]), (name, key)
    assert numbers(tmp_path / "out")[-1]["skipped"] == 1


@pytest.mark.parametrize("was, now", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_cannot_resume(data, tmp_path, was, now):
    """It may start a new run, as the line says."""
    argv = [*TINY, "--max_iters=5", "--eval_interval=0", f"--data_dir={data}"]
    out = f"{tmp_path}/out"
    finish([*argv, f"--optimizer={was}", f"--out_dir={out}"])
    argv.append(f"--optimizer={now}")

    line = refused([*argv, "--init_from=resume", f"--out_dir={out}"])

    assert f"optimizer={was}, these settings say {now}: --optimizer={was} resumes" in line
    finish([*argv, f"--init_from={out}", f"--out_dir={tmp_path}/new"])


def test_checkpoints_that_number_their_parameters_still_resume(data, tmp_path):
    """As written before moments had names: matrices first, then norms; no setting `optimizer`."""
    argv = [*TINY, "--max_iters=20", "--eval_interval=0", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])
    child = Run([*argv, f"--out_dir={tmp_path}/out"], before=lambda: die_at(13))
    assert child.wait() == -9
    path = checkpoint.step_path(tmp_path / "out", 10)
    state = torch.load(path)
    names = sorted(state["model"], key=lambda name: state["model"][name].dim() < 2)
    state["optimizer"] = {i: state["optimizer"][name] for i, name in enumerate(names)}
    for key in ("tokens", "seconds", "trackers"):
        del state[key]
    for key in ("optimizer", "keep_every", "tokenizer", "checkpoint", "tracker", "schedule"):
        del state["settings"][key]
    torch.save(state, path)

    finish([*argv, "--init_from=resume", f"--out_dir={tmp_path}/out"])

    assert_same_run(tmp_path / "straight", tmp_path / "out")


# ---- a parameter that no token reaches

def leave_a_layer_unused():
    def with_one(*args, **options):
        model = build(*args, **options)
        model.extra = torch.nn.Linear(8, 8)
        return model
    build, train.build_model = train.build_model, with_one


def test_an_unused_parameter_is_named(data, tmp_path):
    argv = [*TINY, "--max_iters=4", f"--data_dir={data}"]
    output = finish([*argv, f"--out_dir={tmp_path}/one"], before=leave_a_layer_unused)
    assert output.count("the loss does not depend on extra.weight, extra.bias: not trained") == 1

    for process in ranks(2, [*argv, f"--out_dir={tmp_path}/two"], [leave_a_layer_unused] * 2):
        assert process.wait() == 2 and "extra.bias: on several processes" in process.output
