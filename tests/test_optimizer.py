"""Muon against a slow plain reference in float64; the schedule; skipped steps, saving, several ranks."""
import copy
from types import SimpleNamespace

import pytest
import torch

import train
from minillm import checkpoint
from minillm.errors import UserError
from minillm.muon import POLAR_EXPRESS, Muon, orthogonalise
from minillm.optimizer import init_for_muon, make_optimizer, parameters_by_role
from model import GPT, GPTConfig
from support.tiny_models import tiny_model
from support.training_runs import (MOE, TINY, Run, assert_same_run, die_at, finish, make_data,
                                   newest, numbers, on_step, ranks, refused)

SPLIT = (16, 8, 8)
MUON = ["--optimizer=muon", "--learning_rate=0.03", "--min_lr=0", "--schedule=linear"]


def matrices(dtype=torch.float64):
    """Three fused qkv, three up and down, experts (E, in, out)."""
    torch.manual_seed(0)
    shapes = {"qkv": [(32, 16)] * 3, "up": [(48, 16)] * 3, "down": [(16, 48)] * 3,
              "experts": [(5, 16, 24)] * 2}
    return {name: [torch.nn.Parameter(torch.randn(shape, dtype=dtype) * 0.1) for shape in group]
            for name, group in shapes.items()}


def muon_of(p):
    rest = [x for name in p if name != "qkv" for x in p[name]]
    return Muon([{"params": p["qkv"], "split": SPLIT, "weight_decay": 0.3},
                 {"params": rest, "weight_decay": 0.3}], lr=0.03)


def all_of(p):
    return [x for group in p.values() for x in group]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for x in parameters:
        x.grad = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)


SPECTRA = {"falling": torch.logspace(0, -2, 64), "all equal": torch.ones(64),
           "one large": torch.tensor([1.0] + [0.01] * 63),
           "rank 1": torch.tensor([1.0] + [0.0] * 63)}


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_come_near_one_in_bfloat16(shape, spectrum):
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    s = SPECTRA[spectrum].double()

    values = torch.linalg.svdvals(orthogonalise((u * s @ v * 1e-6).bfloat16()).double())

    assert values.max() < 1.3
    assert values[:, : int((s > 0).sum())].min() > 0.65


class PlainMuon:
    """One matrix (out, in) as the papers write it, by its singular values."""

    def __init__(self, weight, lr, weight_decay):
        self.weight, self.lr, self.weight_decay = weight.clone(), lr, weight_decay
        self.momentum = torch.zeros_like(weight)
        self.neuron = torch.zeros(len(weight), dtype=weight.dtype)

    def step(self, grad):
        self.momentum = 0.9 * self.momentum + 0.1 * grad
        left, s, right = torch.linalg.svd(0.1 * grad + 0.9 * self.momentum, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for a, b, c in POLAR_EXPRESS:
            s = a * s + b * s**3 + c * s**5
        o = left @ torch.diag(s) @ right
        self.neuron = 0.95 * self.neuron + 0.05 * o.square().mean(1)
        even = o / self.neuron.sqrt()[:, None]
        even = even * o.norm() / even.norm()
        rows, columns = o.shape
        length = self.lr * max(1, rows / columns) ** 0.5
        self.weight = self.weight * (1 - self.lr * self.weight_decay) - length * even


def plain_parts(name, weight):
    """The matrices (out, in) that a parameter consists of."""
    if name == "qkv":
        return list(weight.split(SPLIT))
    if name == "experts":
        return [expert.t() for expert in weight]
    return [weight]


@pytest.mark.parametrize("name", ["qkv", "up", "down", "experts"])
def test_matrices_move_as_the_plain_reference_moves_them(name):
    p = matrices()
    plain = [[PlainMuon(part, 0.03, 0.3) for part in plain_parts(name, x.detach())]
             for x in p[name]]
    muon = muon_of(p)

    for step in range(4):
        set_gradients(all_of(p), step)
        for x, parts in zip(p[name], plain):
            for part, grad in zip(parts, plain_parts(name, x.grad)):
                part.step(grad)
        muon.step()

    for x, parts in zip(p[name], plain):
        for ours, part in zip(plain_parts(name, x.detach()), parts):
            torch.testing.assert_close(ours, part.weight, rtol=1e-8, atol=1e-9)


def settings(**changes):
    values = dict(optimizer="muon", learning_rate=0.03, beta1=0.9, beta2=0.95, weight_decay=0.1,
                  embedding_rate=2.0, vector_rate=0.5)
    return SimpleNamespace(**values | changes)


def whole_optimizer(model, **changes):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(model, settings(**changes))
    optimizer.set_rate(0.03)
    return optimizer


def step_with(optimizer, parameters, step, norm=1.0, clip=1.0):
    set_gradients(parameters, step)
    optimizer.clip_to(torch.tensor(norm), clip)
    optimizer.step()


@pytest.mark.parametrize("n_expert", [0, 4])
def test_every_parameter_has_one_role_and_its_rate(n_expert):
    model = tiny_model(n_expert=n_expert)
    optimizer = whole_optimizer(model)

    roles = parameters_by_role(model)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert set(rates) == set(model.parameters())
    assert len([p for group in roles.values() for p in group]) == len(rates)
    assert rates[model.wte.weight] == 0.06 and rates[model.norm.weight] == 0.015
    assert all(rates[p] == 0.03 for p in roles["matrices"] + roles["qkv"])
    assert len(roles["matrices"]) == 2 * 3 and len(roles["routers"]) == (4 if n_expert else 0)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_clipping_equals_smaller_gradients(kind):
    a, b = tiny_model(), tiny_model()
    clipped, plain = whole_optimizer(a, optimizer=kind), whole_optimizer(b, optimizer=kind)

    for step in range(3):
        step_with(plain, list(b.parameters()), step)
        set_gradients(list(a.parameters()), step)
        for parameter in a.parameters():
            parameter.grad.mul_(4)
        clipped.clip_to(torch.tensor(4.0), 1.0)
        clipped.step()

    torch.testing.assert_close(list(a.parameters()), list(b.parameters()))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("asks_host", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("before", [0, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(kind, asks_host, bad, before):
    model = tiny_model()
    parameters = list(model.parameters())
    optimizer = whole_optimizer(model, optimizer=kind)
    optimizer.asks_host = asks_host
    for step in range(before):
        step_with(optimizer, parameters, step)
    weights, state = copy.deepcopy(parameters), copy.deepcopy(optimizer.state_dict())

    set_gradients(parameters, 99)
    for parameter in parameters:
        parameter.grad.view(-1)[3] = bad
    optimizer.clip_to(torch.tensor(bad), 1.0)
    optimizer.step()

    assert all(torch.equal(x, y) for x, y in zip(parameters, weights))
    for name, moments in optimizer.state_dict().items():
        for key, value in moments.items():
            old = state[name][key] if before else torch.zeros_like(value)
            assert torch.equal(value, old), (name, key)


def test_a_state_that_does_not_fit_is_refused_by_name():
    model = tiny_model()
    optimizer = whole_optimizer(model)
    step_with(optimizer, list(model.parameters()), 0)
    saved = optimizer.state_dict()
    saved["blocks.1.attn.qkv.weight"]["neuron"] = torch.zeros(3, 1)

    with pytest.raises(UserError, match="neuron of blocks.1.attn.qkv.weight"):
        optimizer.load_state_dict(saved)
    with pytest.raises(UserError, match="step of"):
        whole_optimizer(model, optimizer="adamw").load_state_dict(optimizer.state_dict())


def test_a_fresh_model_starts_with_the_same_logits():
    """The embedding starts 25 times larger, the last norm smaller; the logits keep their spread.

    All but that of the token itself, which is larger: the embedding outweighs what the blocks add.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=1024, vocab_size=300))
    idx = torch.arange(64)[None]
    before = model(idx)[..., 64:].std()

    init_for_muon(model)

    assert model.wte.weight.std().item() == pytest.approx(0.5, rel=0.01)
    assert model.norm.weight.unique().item() == pytest.approx(0.04)
    assert model(idx)[..., 64:].std().item() == pytest.approx(before.item(), rel=0.1)


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


# ---- in a run

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("optimizer") / "data")


@pytest.mark.parametrize("extra", [[], MOE, ["--dtype=float16"]], ids=["dense", "moe", "fp16"])
def test_muon_resumes_to_the_bit(data, tmp_path, extra):
    """Killed at step 13, resumed from step 10 by a command that does not name the optimizer."""
    argv = [*TINY, *MUON, *extra, "--max_iters=20", "--eval_interval=0", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"])

    child = Run([*argv, f"--out_dir={tmp_path}/out"], before=lambda: die_at(13))
    assert child.wait() == -9
    again = [flag for flag in argv if flag != "--optimizer=muon"]
    finish([*again, "--init_from=resume", f"--out_dir={tmp_path}/out"])

    assert_same_run(tmp_path / "straight", tmp_path / "out")
    moments = newest(tmp_path / "out")["optimizer"]["blocks.0.attn.qkv.weight"]
    assert sorted(moments) == ["momentum", "neuron"]


def test_ranks_share_the_work_and_agree(data, tmp_path):
    argv = [*TINY, *MUON, "--max_iters=6", "--eval_interval=0", "--dropout=0",
            "--gradient_accumulation_steps=4", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/one"])
    shares = [f"{tmp_path}/share_{rank}" for rank in range(4)]

    def note_share(path):
        def before():
            inner = Muon._start

            def start(self, group, params):
                direction = self._direction

                def noted(*args):
                    part = direction(*args)
                    with open(path, "a") as file:
                        file.write(f"{len(part)}\n")
                    return part
                self._direction = noted
                finish = inner(self, group, params)
                self._direction = direction
                return finish
            Muon._start = start
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
        assert all(torch.equal(value, new["optimizer"][name][key]) for key, value in moments.items())
    assert numbers(tmp_path / "out")[-1]["skipped"] == 1


def test_another_optimizer_cannot_resume(data, tmp_path):
    argv = [*TINY, "--max_iters=5", "--eval_interval=0", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/out"])

    line = refused([*argv, *MUON, "--init_from=resume", f"--out_dir={tmp_path}/out"])

    assert "optimizer" in line and "momentum of" in line


def test_checkpoints_that_number_their_parameters_still_resume(data, tmp_path):
    """As written before moments had names: matrices first, then norms, and no setting `optimizer`."""
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
