"""Layers that differ: an MoE in some of them, an activation, a width or heads of their own.

Also blocks that stand, or run, more than once.
"""
import json
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minillm import same_function, stock_model
from minillm.errors import UserError
from minillm.run_log import RunLog
from minillm.same_function import noisy_in_training
from minillm.speed import agreement, fast_versions, parts
from model import FFN, GPT, Attention
from moe import loop_over_experts
from support import processes
from support.exports import export_folder
from support.model_changes import KINDS
from support.tiny_models import tiny_model, write_folder
from support.training_runs import (MOE, TINY, Run, assert_same_run, die_at, finish, finish_ranks,
                                   numbers)
from support.uncached import uncached
from train import Settings

CPU = torch.device("cpu")
MIXED = dict(n_layer=3, n_expert=4)
DEEP = dict(n_layer=7)


def after_init(patch, change):
    """Let change(model) edit the layers of every new GPT."""
    def init(self, config):
        plain(self, config)
        change(self)
    plain = GPT.__init__
    patch.setattr(GPT, "__init__", init)


@pytest.fixture
def first_layer_dense(monkeypatch):
    """An MoE in all layers but the first, as DeepSeek-V3 has it."""
    after_init(monkeypatch, make_first_layer_dense)


def make_first_layer_dense(model):
    model.blocks[0].ffn = FFN(model.config)


def patch_first_layer_dense():
    """The same, in a child."""
    after_init(pytest.MonkeyPatch(), make_first_layer_dense)


# ---- an MoE in some layers

def test_the_parameters_of_each_moe_layer_are_counted(first_layer_dense):
    model = tiny_model(**MIXED)

    total, active = model.n_params()

    assert [layer for layer, _ in model.moe_layers()] == [1, 2]
    assert total - active == 2 * (4 - 2) * (2 * 32 * 48)     # layers, idle experts, their matrices


def test_a_gate_of_the_experts_counts_among_their_parameters():
    model = tiny_model(**KINDS["MoE"])
    before = model.n_params()
    for _, moe in model.moe_layers():
        moe.w3_EDF = torch.nn.Parameter(torch.zeros_like(moe.w1_EDF))

    total, active = model.n_params()

    assert total - before[0] == 2 * 4 * 32 * 48 and active - before[1] == 2 * 2 * 32 * 48


@torch.inference_mode()
def test_a_mixed_model_answers_with_all_that_is_fast(first_layer_dense, capsys):
    model = tiny_model(**MIXED).for_generation(CPU, torch.float32)

    made = list(model.generate([5, 6, 7], 12, temperature=0))

    assert made == uncached(model, [5, 6, 7], 12, temperature=0)
    assert fast_versions.decodes_on_cpu(model) and fast_versions.decodes_compiled(model)
    assert all(moe.experts is not loop_over_experts for _, moe in model.moe_layers())
    assert capsys.readouterr().err == ""


def test_parts_run_a_mixed_model(first_layer_dense):
    def trunk(copy, *args):
        return parts.trunk(copy, copy.embed, parts.run_block, copy.norm, *args)

    assert agreement.disagreement(tiny_model(**MIXED), agreement.runs_the_blocks, trunk) is None


@torch.inference_mode()
def test_a_mixed_model_answers_in_bfloat16(first_layer_dense):
    model = tiny_model(**MIXED).for_generation(CPU, torch.bfloat16)

    assert len(list(model.generate([5, 6, 7], 12))) == 12


def test_a_mixed_model_is_trained_resumed_and_scored(data, tmp_path):
    argv = [*TINY, *MOE, "--n_layer=3", "--max_iters=12", "--eval_interval=6", "--eval_iters=50",
            "--optimizer=muon", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/straight"], before=patch_first_layer_dense)
    child = Run([*argv, f"--out_dir={tmp_path}/out"],
                before=lambda: (patch_first_layer_dense(), die_at(8)))
    assert child.wait() == -signal.SIGKILL

    finish([*argv, "--init_from=resume", f"--out_dir={tmp_path}/out"],
           before=patch_first_layer_dense)
    scored = processes.run("eval", [f"--out_dir={tmp_path}/out", "--device=cpu", "--eval_iters=0",
                                    "--dtype=float32"], before=patch_first_layer_dense)

    assert_same_run(tmp_path / "straight", tmp_path / "out")
    records = numbers(tmp_path / "out")
    assert all(len(record["load"]) == 2 for record in records if "load" in record)
    with open(tmp_path / "out" / "eval.json") as file:
        results = json.load(file)
    assert results["loss"] == pytest.approx(records[-1]["val_loss"], abs=1e-3)
    rows = scored.out.split("\nlayer")[1].splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["1", "2"]


@pytest.mark.parametrize("flags", [[], ["--activation_checkpointing=True"], ["--shard=True"]])
def test_a_mixed_model_on_two_processes(data, tmp_path, flags):
    argv = [*TINY, *MOE, "--max_iters=4", "--eval_interval=0", f"--data_dir={data}"]

    finish([*argv, f"--out_dir={tmp_path}/one"], before=patch_first_layer_dense)
    finish_ranks(2, [*argv, *flags, f"--out_dir={tmp_path}/two"], [patch_first_layer_dense] * 2)

    for one, two in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two")):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["balance_loss"] == pytest.approx(one["balance_loss"], abs=1e-4)


def test_an_unused_expert_is_named_by_its_layer(first_layer_dense, capsys):
    model = tiny_model(**MIXED)
    log = RunLog(Settings(), model, {"tokens_per_step": 32}, CPU, 1, None, writes=False)
    log.starved = torch.zeros(1)

    for step in range(100):
        log._moe_record(step, [0.1, *[0.25] * 4, 0.5, 0.5, 0.0, 0.0])

    warned = capsys.readouterr().out.splitlines()
    assert [line.split("expert ")[1][:12] for line in warned] == ["2 of layer 2", "3 of layer 2"]


def test_experts_that_one_layer_alone_computes_otherwise(monkeypatch):
    def relu_squared(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD):
        gate_NE = gate_NK.new_zeros(len(x_ND), len(w1_EDF)).scatter(1, expert_NK, gate_NK)
        return (gate_NE.t()[:, :, None] * (F.relu(x_ND @ w1_EDF).square() @ w2_EFD)).sum(0)

    def fewest(logits_NE, k):
        return (-logits_NE).topk(k, dim=1).indices

    def change(model):
        model.blocks[1].ffn.experts = relu_squared
        model.blocks[1].ffn.router.top_experts = fewest
    after_init(monkeypatch, change)
    copy = same_function.small_copy(tiny_model(**KINDS["MoE"]))

    assert not agreement.multiplies_experts(copy, fast_versions.grouped_experts)
    assert not agreement.chooses_experts(copy, fast_versions.top_experts)


def test_a_router_with_a_linear_layer_is_used_in_bfloat16(monkeypatch):
    def change(model):
        for _, moe in model.moe_layers():
            moe.router.gate = torch.nn.Linear(*moe.router.weight_DE.shape, bias=False)
            del moe.router.weight_DE

    def forward(self, x_ND):
        logits_NE = x_ND.to(self.gate.weight.dtype) @ self.gate.weight.t()
        expert_NK = self.top_experts(logits_NE, self.k)
        return logits_NE.gather(1, expert_NK).softmax(dim=1), expert_NK
    monkeypatch.setattr("moe.Router.forward", forward)
    after_init(monkeypatch, change)

    model = tiny_model(**KINDS["MoE"]).for_generation(CPU, torch.bfloat16)

    assert len(list(model.generate([5, 6, 7], 4))) == 4


def test_parts_refuse_other_statistics(monkeypatch):
    """A sum over the layers in place of their mean: the loss alone would not show it."""
    def trunk(self, idx, rope, attend):
        x, (loss, load) = plain(self, idx, rope, attend)
        return x, (loss * self.config.n_layer, load)
    plain = GPT.trunk
    monkeypatch.setattr(GPT, "trunk", trunk)

    with pytest.raises(UserError, match="parts.py computes something else.*leave --compile out"):
        parts.compile_in_parts(tiny_model(**KINDS["MoE"]), CPU)


# ---- layers far from the first

class ReluSquaredFFN(FFN):
    def forward(self, x):
        return self.down(F.relu(self.up(x)).square()), None


def change_deep_layers(model):
    for block in model.blocks[5:]:
        block.ffn.__class__ = ReluSquaredFFN


def test_a_change_of_deep_layers_counts(monkeypatch):
    then = same_function.fingerprint(tiny_model(**DEEP))
    after_init(monkeypatch, change_deep_layers)
    model = tiny_model(**DEEP)

    assert same_function.has_changed(model, then)
    assert not fast_versions.decodes_on_cpu(model)
    with pytest.raises(UserError, match="these compute another"):
        stock_model.check(model)


def test_the_fingerprint_of_four_layers_is_no_change():
    """Older checkpoints hold no more."""
    model = tiny_model(**KINDS["many heads and layers"])
    then = same_function.fingerprint(model, deepest=4)

    assert then[11, -1].item() == pytest.approx(7.846818605700074)
    assert not same_function.has_changed(model, then)


# ---- exports

def other_width(model):
    model.blocks[1].ffn = FFN(replace(model.config, n_inner=24))


@pytest.mark.parametrize("change, kind", [(make_first_layer_dense, "MoE"), (other_width, "dense")])
def test_layers_that_differ_are_not_exported(change, kind, monkeypatch):
    after_init(monkeypatch, change)

    with pytest.raises(UserError, match="these compute another.*(router|24 wide, n_inner is 16)"):
        stock_model.check(tiny_model(**KINDS[kind]))


@pytest.mark.parametrize("kind", ["dense", "MoE"])
def test_a_block_that_stands_twice_is_exported(kind, monkeypatch, tmp_path):
    pytest.importorskip("safetensors")

    def change(model):
        model.blocks[1] = model.blocks[0]
    after_init(monkeypatch, change)
    model = tiny_model(**KINDS[kind])

    exported = export_folder(write_folder(tmp_path, model))
    again = GPT.from_checkpoint(f"hf:{exported}", device="cpu", dtype="float32")

    assert all(torch.equal(again.state_dict()[name], tensor)
               for name, tensor in model.state_dict().items())


# ---- the KV cache

def run_twice(model):
    blocks = [*model.blocks, *model.blocks]
    model.blocks.__class__ = type("Twice", (torch.nn.ModuleList,),
                                  {"__iter__": lambda self: iter(blocks)})


def more_kv_heads(model):
    model.blocks[1].attn = Attention(replace(model.config, n_kv_head=model.config.n_head))


@pytest.mark.parametrize("change", [run_twice, more_kv_heads])
def test_what_does_not_fit_the_cache_is_refused(change, monkeypatch):
    after_init(monkeypatch, change)
    model = tiny_model().for_generation(CPU, torch.float32)

    with pytest.raises(UserError, match="layer [12] of the model does not fit the KV cache"):
        list(model.generate([5, 6, 7], 4))


# ---- a loss that training alone has

def test_a_term_that_only_the_training_loss_has_is_noticed(monkeypatch):
    """Else validation, in the graph of training, would count it."""
    def forward(self, idx, targets=None, attn_mask=None):
        result = plain(self, idx, targets, attn_mask)
        if targets is None or not self.training:
            return result
        return result[0] + self.wte.weight.square().sum(), result[1]
    plain = GPT.forward
    monkeypatch.setattr(GPT, "forward", forward)

    assert noisy_in_training(tiny_model())
