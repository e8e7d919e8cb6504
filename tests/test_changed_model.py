"""Whoever changes a formula in model.py or moe.py gets the change, or hears of what ignores it."""
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import model as model_file
import moe
import train
from minillm import checkpoint, same_function, stock_model
from minillm.configurator import configure
from minillm.errors import UserError
from minillm.run_log import RunLog
from minillm.speed import agreement, decode_cpu, decode_gpu, fast_versions, parts
from minillm.speed.cross_entropy import linear_cross_entropy
from minillm.speed.float8_experts import float8_experts
from minillm.speed.topk import top_experts
from model import FFN, GPT, Attention, Block
from support.tiny_models import tiny_model, write_folder
from train import Settings

CPU = torch.device("cpu")
KINDS = {
    "dense": {},
    "bias": dict(bias=True),
    "MoE": dict(n_expert=4, n_expert_per_tok=2),
    "one expert per token": dict(n_expert=4, n_expert_per_tok=1),
    "many heads and layers": dict(n_layer=6, n_head=16, n_kv_head=8, n_embd=128),
    "one head": dict(n_head=1, n_kv_head=1),
}


# ---- changes that people make, each as a function of monkeypatch

def relu_squared(patch):
    def forward(self, x):
        return self.dropout(self.down(F.relu(self.up(x)).square())), None
    patch.setattr(FFN, "forward", forward)


def gelu(patch):
    """Nearly SiLU, and without a parameter that a checkpoint could miss."""
    patch.setattr(FFN, "forward", lambda self, x: (self.down(F.gelu(self.up(x))), None))


def qk_norm(patch):
    def forward(self, x, rope, attend):
        normed = lambda q, k, v: attend(F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v)
        return plain(self, x, rope, normed)
    plain = Attention.forward
    patch.setattr(Attention, "forward", forward)


def post_norm(patch):
    def forward(self, x, rope, attend):
        x = self.attn_norm(x + self.attn(x, rope, attend))
        y, stats = self.ffn(x)
        return self.ffn_norm(x + y), stats
    patch.setattr(Block, "forward", forward)


def scaled_embedding(patch):
    def trunk(self, idx, rope, attend):
        handle = self.wte.register_forward_hook(lambda module, args, x: 3 * x)
        try:
            return plain(self, idx, rope, attend)
        finally:
            handle.remove()
    plain = GPT.trunk
    patch.setattr(GPT, "trunk", trunk)


def softcap(patch):
    """Logits bounded by tanh, in generation and in the loss."""
    def cross_entropy(x, weight, targets):
        logits = 30 * (F.linear(x, weight) / 30).tanh()
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    plain = GPT.logits
    patch.setattr(GPT, "logits", lambda self, x: 30 * (plain(self, x) / 30).tanh())
    patch.setattr(model_file, "cross_entropy", cross_entropy)


def relu_squared_experts(patch):
    def loop_over_experts(x_ND, gate_NK, expert_NK, w1_EDF, w2_EFD):
        gate_NE = gate_NK.new_zeros(len(x_ND), len(w1_EDF)).scatter(1, expert_NK, gate_NK)
        h_ENF = F.relu(x_ND @ w1_EDF).square()
        return (gate_NE.t()[:, :, None] * (h_ENF @ w2_EFD)).sum(0)
    patch.setattr(moe, "loop_over_experts", loop_over_experts)


def sigmoid_router(patch):
    def forward(self, x_ND):
        score_NE = (x_ND @ self.weight_DE).sigmoid()
        expert_NK = self.top_experts(score_NE, self.k)
        return score_NE.gather(1, expert_NK), expert_NK
    patch.setattr(moe.Router, "forward", forward)


def other_experts(patch):
    patch.setattr(moe, "top_experts", lambda logits_NE, k: (-logits_NE).topk(k, dim=1).indices)


CHANGES = {change.__name__: change for change in (
    relu_squared, gelu, qk_norm, post_norm, scaled_embedding, softcap, relu_squared_experts,
    sigmoid_router, other_experts)}
EXPERTS = {relu_squared_experts, sigmoid_router, other_experts}
GENERAL = [qk_norm, post_norm, scaled_embedding]
FFNS = [relu_squared, gelu]


# ---- the fast versions

def checks(model):
    """{name: does this fast version agree with the plain code of `model`?}"""
    def loss(copy):
        fast = partial(linear_cross_entropy, plain=copy.cross_entropy)
        return agreement.has_the_loss(copy, fast)

    def trunk(copy):
        fast = lambda copy, *args: parts.trunk(copy, parts.embed, parts.run_block, copy.norm, *args)
        return agreement.runs_the_blocks(copy, fast)
    found = {"decode_cpu": fast_versions.decodes_on_cpu(model),
             "VECTOR": fast_versions.decodes_compiled(model, "VECTOR"),
             "BATCH": fast_versions.decodes_compiled(model, "BATCH"),
             "loss": agreement.agrees(model, "loss", loss),
             "parts": agreement.agrees(model, "parts", trunk)}
    if model.config.n_expert:
        for name, function, tolerance in (("grouped", fast_versions.grouped_experts, 1e-4),
                                          ("all", fast_versions.all_experts, 1e-4),
                                          ("float8", float8_experts, 0.2)):
            found[name] = agreement.agrees(model, name, agreement.multiplies_experts, function,
                                           tolerance)
        found["choice"] = agreement.agrees(model, "choice", agreement.chooses_experts, top_experts)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_model_keeps_all_fast_versions(kind, capsys):
    assert set(checks(tiny_model(**KINDS[kind])).values()) == {True}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change, left_out", [
    (relu_squared, {"decode_cpu", "VECTOR"}),
    (gelu, {"decode_cpu", "VECTOR"}),
    (qk_norm, {"decode_cpu", "VECTOR"}),
    (post_norm, {"decode_cpu", "VECTOR"}),
    (scaled_embedding, {"decode_cpu", "VECTOR", "BATCH", "parts"}),
    (softcap, {"decode_cpu", "VECTOR", "loss"}),
    (relu_squared_experts, {"decode_cpu", "VECTOR", "grouped", "all", "float8"}),
    (sigmoid_router, {"VECTOR"}),
    (other_experts, {"VECTOR", "choice"}),
], ids=lambda value: getattr(value, "__name__", ""))
def test_what_no_longer_agrees_is_left_out(change, left_out, monkeypatch, capsys):
    change(monkeypatch)
    kind = KINDS["MoE"] if change in EXPERTS else {}

    found = checks(tiny_model(**kind))

    assert {name for name, agrees in found.items() if not agrees} == left_out
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(left_out)
    assert all("computes something else than model.py and moe.py" in line for line in lines)


def greedy(model, prompt, steps):
    """The likeliest tokens, without a cache and without anything fast."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(model(torch.tensor([ids]))[0, -1, : model.tokenizer.vocab_size].argmax().item())
    return ids[len(prompt):]


@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_a_changed_model_answers_as_it_computes(change, monkeypatch):
    """Prompt and answer by one formula: before the check, the answer was made by the old one."""
    CHANGES[change](monkeypatch)
    kind = KINDS["MoE"] if CHANGES[change] in EXPERTS else {}
    model = tiny_model(**kind).for_generation(CPU, torch.float32)

    made = list(model.generate([5, 6, 7], 12, temperature=0))

    assert made == greedy(model, [5, 6, 7], 12)


def test_changed_experts_are_trained(monkeypatch):
    relu_squared_experts(monkeypatch)
    plain, fast = tiny_model(**KINDS["MoE"]), tiny_model(**KINDS["MoE"]).use_fast()
    idx = torch.arange(20)[None]

    torch.testing.assert_close(fast(idx), plain(idx))


def test_8_bits_refuse_changed_experts(monkeypatch):
    relu_squared_experts(monkeypatch)
    model = tiny_model(**KINDS["MoE"]).use_fast()

    with pytest.raises(UserError, match="float8_experts.py computes something else.*leave --fp8"):
        fast_versions.use_float8(model, CPU, torch.bfloat16, 64)


def test_8_bits_leave_a_derived_layer_alone():
    """Its class would be replaced, and with it what it computes."""
    class Derived(torch.nn.Linear):
        pass
    model = tiny_model()
    model.blocks[0].ffn.up.__class__ = Derived

    fast_versions.use_float8(model, CPU, torch.bfloat16, 64)

    assert type(model.blocks[0].ffn.up) is Derived
    assert type(model.blocks[1].ffn.up) is not torch.nn.Linear


def test_parts_refuse_another_trunk(monkeypatch):
    scaled_embedding(monkeypatch)

    with pytest.raises(UserError, match="parts.py computes something else.*leave --compile out"):
        parts.compile_in_parts(tiny_model(), CPU)


def test_a_model_that_refuses_the_copy_runs_plainly(monkeypatch, capsys):
    def refuse(self, config):
        if config.n_embd != 40:
            raise ValueError("only this size")
        plain(self, config)
    plain = GPT.__init__
    monkeypatch.setattr(GPT, "__init__", refuse)
    model = tiny_model(n_embd=40)

    assert not fast_versions.decodes_on_cpu(model)
    assert "does not fit the model (ValueError: only this size)" in capsys.readouterr().err


# ---- checkpoints

@pytest.mark.parametrize("change", [*CHANGES, "none"])
def test_a_checkpoint_of_other_code_is_named(change, monkeypatch, tmp_path, capsys):
    kind = KINDS["MoE"] if CHANGES.get(change) in EXPERTS else {}
    folder = write_folder(tmp_path, tiny_model(**kind))
    if change != "none":
        CHANGES[change](monkeypatch)

    GPT.from_checkpoint(folder, device="cpu", dtype="float32")

    named = f"{checkpoint.step_path(folder, 7)}: model.py (or what it imports) has changed since"
    assert (named in capsys.readouterr().err) == (change != "none")


@pytest.mark.parametrize("odd", [None, 7, "text", torch.zeros(3), torch.ones(12, 16).to_sparse(),
                                 torch.full((12, 16), torch.nan)],
                         ids=["none", "a number", "text", "another shape", "sparse", "NaN"])
def test_an_odd_fingerprint_stops_nothing(odd, tmp_path):
    path = checkpoint.step_path(write_folder(tmp_path, tiny_model()), 7)
    checkpoint.save(path, torch.load(path, weights_only=True) | {"fingerprint": odd})

    GPT.from_checkpoint(tmp_path, device="cpu", dtype="float32")


@pytest.mark.parametrize("kind, last", [("dense", 23.65160643709674), ("MoE", 5.850867427474995)])
def test_the_fingerprint_of_the_original_code(kind, last):
    """If it changes, whoever has trained before is told that the model has changed."""
    logits = same_function.fingerprint(tiny_model(**KINDS[kind]))

    assert logits[-1, -1].item() == pytest.approx(last)


# ---- exports

@pytest.mark.parametrize("kind", ["dense", "bias", "MoE", "many heads and layers"])
def test_the_unchanged_model_can_be_exported(kind):
    stock_model.check(tiny_model(**KINDS[kind]))


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_stock_class_computes_is_not_exported(change, monkeypatch):
    CHANGES[change](monkeypatch)
    kind = KINDS["MoE"] if CHANGES[change] in EXPERTS else {}

    with pytest.raises(UserError, match="these compute another"):
        stock_model.check(tiny_model(**kind))


def test_a_model_that_cannot_be_compared_is_not_exported(monkeypatch):
    """Its weights have other names, for instance."""
    def renamed(self, config):
        plain(self, config)
        self.gate, self.up = self.up, None
    plain = FFN.__init__
    monkeypatch.setattr(FFN, "__init__", renamed)
    monkeypatch.setattr(FFN, "forward", lambda self, x: (self.down(F.silu(self.gate(x))), None))

    with pytest.raises(UserError, match="these compute another.*KeyError.*ffn.up.weight"):
        stock_model.check(tiny_model())


# ---- the training loop

@pytest.mark.parametrize("kind", ["dense", "MoE"])
def test_a_number_that_the_log_does_not_know_is_refused(kind):
    """Of an MoE with one layer it was taken for the load-balancing loss."""
    model = tiny_model(**KINDS[kind] | dict(n_layer=1))
    log = RunLog(configure(Settings, []), model, {"tokens_per_step": 32}, CPU, 1, None,
                 writes=False)
    known = 2 + (1 + 4 if model.config.n_expert else 0)

    log.step(0, 0.1, torch.ones(known))
    with pytest.raises(ValueError, match=f"gives {known - 1} numbers after loss and norm"):
        log.step(1, 0.1, torch.ones(known + 1))


@pytest.mark.parametrize("flags, world, needs", [
    (["--fp8"], 1, True), (["--compile"], 2, True), (["--compile"], 1, False), ([], 2, False)])
def test_without_speed_what_needs_it_is_refused(flags, world, needs, monkeypatch):
    monkeypatch.setattr(train, "fast_versions", None)
    s = configure(Settings, [*flags, "--gradient_accumulation_steps=2"])

    if needs:
        with pytest.raises(UserError, match="need minillm/speed, which was deleted"):
            train.check(s, world)
    else:
        train.check(s, world)
