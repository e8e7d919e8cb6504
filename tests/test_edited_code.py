"""Small edits of a researcher count in training, evaluation and when resuming, or are reported."""
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

import model as model_file
import train
from minillm import run_folder, stock_model
from minillm.activation_checkpointing import checkpoint_blocks
from minillm.errors import UserError
from minillm.optimizer import Optimizer
from minillm.same_function import check_loss, noisy_in_training
from minillm.tokenizer import IM_START, Tokenizer
from model import FFN, GPT, Block, GPTConfig
from moe import Router
from support.model_changes import KINDS, softcap
from support.tiny_models import tiny_model
from support.training_runs import (BLOCK, MOE, TINY, Run, assert_same_run, die_at, finish,
                                   newest)

SHORT = [*TINY, "--max_iters=4", "--eval_interval=0"]


class ParallelBlock(Block):
    def forward(self, x, rope, attend):
        y, stats = self.ffn(self.ffn_norm(x))
        return x + self.attn(self.attn_norm(x), rope, attend) + y, stats


def test_blocks_of_several_kinds_are_checkpointed_as_what_they_are():
    model = tiny_model(n_layer=4)
    for block in model.blocks[1::2]:
        block.__class__ = ParallelBlock
    idx = torch.arange(16)[None]
    expected = model(idx, idx)[0]

    checkpoint_blocks(model)

    assert torch.equal(model(idx, idx)[0], expected)


def test_a_name_that_ends_alike_is_initialised_as_all_others(monkeypatch):
    """Only what adds to the residual stream starts smaller, not a gate_proj or an up_proj."""
    def more_layers(self, config):
        plain(self, config)
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.slow_down = nn.Linear(config.n_embd, config.n_inner, bias=False)
    plain = FFN.__init__
    monkeypatch.setattr(FFN, "__init__", more_layers)

    model = tiny_model(n_layer=8, n_embd=128)
    ffn, std = model.blocks[0].ffn, 10 * model.config.init_std

    for layer in (ffn.up, ffn.gate_proj, ffn.slow_down):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    assert ffn.down.weight.std().item() == pytest.approx(std / 4, rel=0.05)


def balanced_by_a_bias(patch):
    """Experts chosen with a bias that training moves, as in DeepSeek-V3; their tokens counted."""
    def init(self, config):
        plain(self, config)
        self.register_buffer("bias_E", torch.zeros(config.n_expert))
        self.register_buffer("seen_E", torch.zeros(config.n_expert, dtype=torch.long))

    def forward(self, x_ND):
        logits_NE = x_ND.to(self.bias_E.dtype) @ self.weight_DE.to(self.bias_E.dtype)
        expert_NK = self.top_experts(logits_NE + self.bias_E, self.k)
        if self.training:
            count_E = F.one_hot(expert_NK, len(self.bias_E)).sum((0, 1))
            self.seen_E += count_E
            self.bias_E += 0.1 * (count_E.double().mean() - count_E).sign()
        return logits_NE.gather(1, expert_NK).softmax(dim=1), expert_NK
    plain = Router.__init__
    patch.setattr(Router, "__init__", init)
    patch.setattr(Router, "forward", forward)


# ---- the loss, and the logits

def label_smoothing(patch):
    patch.setattr(model_file, "cross_entropy", lambda x, weight, targets: F.cross_entropy(
        F.linear(x, weight), targets, ignore_index=-1, reduction="sum", label_smoothing=0.1))


def softcap_of_the_logits_alone(patch):
    plain = GPT.logits
    patch.setattr(GPT, "logits", lambda self, x: 3 * (plain(self, x) / 3).tanh())


@pytest.mark.parametrize("change", [label_smoothing, softcap_of_the_logits_alone])
def test_a_loss_that_is_not_that_of_the_logits_is_reported(change, monkeypatch, capsys):
    change(monkeypatch)

    check_loss(tiny_model())

    assert "the training loss is not the cross-entropy of GPT.logits" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_loss_is_not_mentioned(kind, monkeypatch, capsys):
    check_loss(tiny_model(**KINDS[kind]))
    softcap(monkeypatch)
    check_loss(tiny_model(**KINDS[kind]))

    assert capsys.readouterr().err == ""


def test_training_compares_its_loss(data, tmp_path):
    def before():
        GPT.logits = lambda self, x: 2 * F.linear(x, self.wte.weight)

    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    assert "the training loss is not the cross-entropy of GPT.logits" in output


def test_noise_that_only_training_has_is_noticed(monkeypatch):
    assert not noisy_in_training(tiny_model(dropout=0.1))        # train.py knows this one
    assert noisy_in_training(tiny_model(n_expert=4, n_expert_per_tok=2))    # the router's

    def forward(self, x):
        y, stats = plain(self, x)
        return F.dropout(y, 0.1, self.training), stats
    plain = FFN.forward
    monkeypatch.setattr(FFN, "forward", forward)

    assert noisy_in_training(tiny_model())


def test_a_forward_pass_that_moves_a_buffer_is_noticed(monkeypatch):
    """Else validation, in the graph of training, would move it too."""
    balanced_by_a_bias(monkeypatch)

    assert noisy_in_training(tiny_model(n_expert=4, n_expert_per_tok=2))


# ---- settings and frozen parameters

@pytest.mark.parametrize("name", ["wte.weight", "blocks.0.ffn.up.weight", "norm.weight"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_frozen_parameter_stays_and_the_run_resumes(data, tmp_path, name, optimizer):
    def before():
        def frozen(*args, **options):
            model.append(build(*args, **options))
            model[0].get_parameter(name).requires_grad_(False)
            return model[0]
        model, build = [], train.build_model
        train.build_model = frozen
    argv = [*SHORT, f"--optimizer={optimizer}", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish(argv, before=before)
    weight = newest(tmp_path / "out")["model"][name]

    finish([*argv, "--init_from=resume", "--max_iters=6"], before=before)

    after = newest(tmp_path / "out")
    assert after["step"] == 6 and torch.equal(after["model"][name], weight)


@pytest.mark.parametrize("name", ["norm.weight", "blocks.1.attn.proj.weight"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_had_no_gradient_before_is_trained_from_now_on(data, tmp_path, name, optimizer):
    """Its moments start from zero, as those of a new run do."""
    def before():
        def frozen(*args, **options):
            model = build(*args, **options)
            model.get_parameter(name).requires_grad_(False)
            return model
        build, train.build_model = train.build_model, frozen
    argv = [*SHORT, f"--optimizer={optimizer}", f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish(argv, before=before)
    weight = newest(tmp_path / "out")["model"][name]

    output = finish([*argv, "--init_from=resume", "--max_iters=6"])

    assert f"no optimizer state of {name}: frozen or unused" in output
    assert not torch.equal(newest(tmp_path / "out")["model"][name], weight)


# ---- another optimizer

class Lion(torch.optim.Optimizer):
    """As people write it: it knows neither grad_scale nor found_inf."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_((momentum * 0.9 + p.grad * 0.1).sign(), alpha=group["lr"])
                momentum.lerp_(p.grad, 0.01)


def sgd(groups, lr):
    return torch.optim.SGD(groups, lr, momentum=0.9)


def all_by(model, kind):
    return Optimizer(model, [kind([{"params": list(model.parameters()), "lr_scale": 1.0}], 0.01)])


@pytest.mark.parametrize("kind", [Lion, sgd])
def test_another_optimizer_resumes_to_the_bit(data, tmp_path, kind):
    def before():
        train.make_optimizer = lambda model, *rest: all_by(model, kind)
    argv = [*TINY, "--max_iters=20", "--eval_interval=0", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"], before=before)
    child = Run([*argv, f"--out_dir={tmp_path}/out"], before=lambda: (before(), die_at(13)))
    assert child.wait() == -9

    finish([*argv, "--init_from=resume", f"--out_dir={tmp_path}/out"], before=before)

    assert_same_run(tmp_path / "straight", tmp_path / "out")


def test_another_optimizer_clips_and_skips():
    model = tiny_model().requires_grad_(True)
    optimizer = all_by(model, sgd)
    weight = model.norm.weight.detach().clone()

    for norm in (torch.inf, 4.0):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.set_clipping(torch.tensor(norm), 1.0)
        optimizer.step()

    torch.testing.assert_close(model.norm.weight.detach(), weight - 0.01 / 4)


# ---- fields of the model, and buffers

@dataclass
class LargerConfig(GPTConfig):
    activation: Literal["silu", "relu2"] = "silu"
    window: int | None = None
    wide_layers: tuple[int, ...] = (0, 3)


def test_a_field_of_the_model_need_not_be_a_setting(data, tmp_path, monkeypatch):
    def before():
        train.GPTConfig = LargerConfig
    argv = [*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    finish(argv, before=before)
    finish([*argv, "--init_from=resume", "--max_iters=6"], before=before)

    monkeypatch.setattr(model_file, "GPTConfig", LargerConfig)
    model = GPT.from_checkpoint(tmp_path / "out", device="cpu")
    assert (model.config.activation, model.config.window) == ("silu", None)
    assert model.step == 6 and model.config.wide_layers == (0, 3)


def test_buffers_are_saved_and_resumed(data, tmp_path):
    def before():
        balanced_by_a_bias(pytest.MonkeyPatch())
    argv = [*SHORT, *MOE, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    finish(argv, before=before)
    finish([*argv, "--init_from=resume", "--max_iters=6"], before=before)

    seen = newest(tmp_path / "out")["model"]["blocks.0.ffn.router.seen_E"]
    assert seen.sum() == 6 * 2 * 2 * BLOCK * 2           # steps, micro-steps, rows, tokens, experts


def test_a_buffer_that_starts_at_zero_is_not_lost_in_an_export(monkeypatch):
    balanced_by_a_bias(monkeypatch)

    with pytest.raises(UserError, match="these compute another"):
        stock_model.check(tiny_model(**KINDS["MoE"]))


def prefix_without_line_end(tokenizer, role):
    return [IM_START, *tokenizer.encode(role)]


def prefix_of_assistants_named_otherwise(tokenizer, role):
    name = "bot" if role == "assistant" else role
    return [IM_START, *tokenizer.encode(name + "\n")]


def prefix_of_a_system_prompt_without_role(tokenizer, role):
    return [IM_START, *tokenizer.encode("" if role == "system" else role + "\n")]


@pytest.mark.parametrize("prefix", [prefix_without_line_end, prefix_of_assistants_named_otherwise,
                                    prefix_of_a_system_prompt_without_role])
def test_another_chat_template_is_not_exported(prefix, monkeypatch):
    """The formats have templates of their own, which would go on writing the old one."""
    stock_model.check(tiny_model())
    monkeypatch.setattr(Tokenizer, "prefix", prefix)

    with pytest.raises(UserError, match="chat template of the original encode_chat"):
        stock_model.check(tiny_model())


@pytest.mark.gpu
def test_buffers_go_to_the_device_with_the_weights():
    model = tiny_model()
    model.blocks[0].register_buffer("slopes", torch.ones(4), persistent=False)

    model.for_generation(torch.device("cuda"), torch.float32)

    assert all(tensor.is_cuda for tensor in [*model.buffers(), *model.parameters()])


def test_a_setting_without_a_comment_is_saved(tmp_path):
    @dataclass
    class Settings:
        z_loss: float = 0.5

    run_folder.write_settings(str(tmp_path), Settings(), {})

    assert run_folder.read_settings(str(tmp_path)) == {"z_loss": 0.5}
