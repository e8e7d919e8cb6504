"""Whoever changes a formula in model.py or moe.py gets the change, or hears of what ignores it."""
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from minillm import checkpoint, same_function, stock_model
from minillm.errors import UserError
from minillm.generation import KVCache, decode_one_token
from minillm.speed import agreement, fast_versions, parts
from minillm.speed.cross_entropy import linear_cross_entropy
from minillm.speed.float8_experts import float8_experts
from minillm.speed.topk import top_experts
from model import FFN, GPT
from support.exports import export_folder
from support.model_changes import (CHANGES, EXPERTS, KINDS, gelu, other_experts, post_norm, qk_norm,
                                   relu_squared, relu_squared_experts, scaled_embedding,
                                   sigmoid_router, softcap, window)
from support.tiny_models import tiny_model, write_folder

CPU = torch.device("cpu")


# ---- the fast versions

def checks(model):
    """{name: does this fast version agree with the plain code of `model`?}"""
    def loss(copy):
        fast = partial(linear_cross_entropy, plain=copy.cross_entropy)
        return agreement.has_the_loss(copy, fast)

    def trunk(copy):
        fast = lambda copy, *args: parts.trunk(copy, copy.embed, parts.run_block, copy.norm, *args)
        return agreement.runs_the_blocks(copy, fast)
    found = {"decode_cpu": fast_versions.decodes_on_cpu(model),
             "decode_gpu": fast_versions.decodes_compiled(model),
             "draw": fast_versions.draws_compiled(model),
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
    (relu_squared, {"decode_cpu", "decode_gpu"}),
    (gelu, {"decode_cpu", "decode_gpu"}),
    (qk_norm, {"decode_cpu", "decode_gpu"}),
    (window, {"decode_cpu", "decode_gpu"}),
    (post_norm, {"decode_cpu", "decode_gpu"}),
    (scaled_embedding, {"decode_cpu", "decode_gpu", "parts"}),
    (softcap, {"decode_cpu", "decode_gpu", "loss"}),
    (relu_squared_experts, {"decode_cpu", "decode_gpu", "grouped", "all", "float8"}),
    (sigmoid_router, {"decode_gpu"}),
    (other_experts, {"decode_gpu", "choice"}),
], ids=lambda value: getattr(value, "__name__", ""))
def test_what_no_longer_agrees_is_left_out(change, left_out, monkeypatch, capsys):
    change(monkeypatch)
    kind = KINDS["MoE"] if change in EXPERTS else {}

    found = checks(tiny_model(**kind))

    assert {name for name, agrees in found.items() if not agrees} == left_out
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(left_out)
    assert all("computes something else than model.py, moe.py" in line for line in lines)


def halved_gradient(x):
    """x, of which half the gradient comes back."""
    return x / 2 + x.detach() / 2


@pytest.mark.parametrize("argument", [0, 1, 3, 4], ids=["x", "gates", "w1", "w2"])
def test_experts_with_one_wrong_gradient_do_not_agree(argument):
    def wrong(*arguments):
        arguments = list(arguments)
        arguments[argument] = halved_gradient(arguments[argument])
        return fast_versions.grouped_experts(*arguments)
    copy = same_function.small_copy(tiny_model(**KINDS["MoE"]))

    assert agreement.multiplies_experts(copy, fast_versions.grouped_experts)
    assert not agreement.multiplies_experts(copy, wrong)


def test_a_loss_with_anything_wrong_does_not_agree():
    copy = same_function.small_copy(tiny_model())

    def of_x(x, weight, targets):
        return copy.cross_entropy(halved_gradient(x), weight, targets)

    def of_weight(x, weight, targets):
        return copy.cross_entropy(x, halved_gradient(weight), targets)

    def of_no_target(x, weight, targets):
        return copy.cross_entropy(x, weight, targets.clamp(min=0))
    assert agreement.has_the_loss(copy, copy.cross_entropy)
    for wrong in (of_x, of_weight, of_no_target):
        assert not agreement.has_the_loss(copy, wrong)


@pytest.mark.parametrize("wrong", range(agreement.STEPS))
def test_one_wrong_step_of_decoding_is_enough(wrong):
    steps = []

    def step(*arguments):
        steps.append(arguments)
        return decode_one_token(*arguments) + (len(steps) == wrong + 1)
    copy = same_function.small_copy(tiny_model())

    assert not agreement.decodes(copy, step, KVCache)


def test_what_is_left_out_is_said_once_for_each_model(monkeypatch, capsys):
    softcap(monkeypatch)
    for _ in range(2):
        model = tiny_model()
        assert not fast_versions.decodes_on_cpu(model)
        assert not fast_versions.decodes_on_cpu(model)
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("dtype, without_gradient, plainly", [
    (torch.bfloat16, False, False), (torch.float16, False, True), (torch.bfloat16, True, True)],
    ids=["bfloat16", "float16", "no gradient"])
def test_where_the_loss_is_the_plain_one(dtype, without_gradient, plainly):
    """Float16 could not hold a gradient that is not yet divided by the number of tokens.

    The weight is in float32, as under autocast.
    """
    calls = []
    x, weight = torch.randn(6, 8).to(dtype).requires_grad_(), torch.randn(11, 8).requires_grad_()

    with torch.set_grad_enabled(not without_gradient):
        linear_cross_entropy(x, weight, torch.arange(6), lambda *arguments: calls.append(arguments))

    assert len(calls) == plainly


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

    assert logits[11, -1].item() == pytest.approx(last)


@pytest.mark.parametrize("rows, block_size", [(12, 48), (None, 48), (None, 96), (None, 40)])
def test_the_fingerprint_of_another_context_is_no_change(rows, block_size):
    """SFT may lengthen the context; older checkpoints hold 12 rows."""
    then = same_function.fingerprint(tiny_model(block_size=48))[:rows]

    assert not same_function.has_changed(tiny_model(block_size=block_size), then)


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


@pytest.mark.parametrize("format, package", [("hf", "safetensors"), ("gguf", "gguf")])
def test_export_refuses_what_it_cannot_express(monkeypatch, tmp_path, format, package):
    pytest.importorskip(package)
    folder = write_folder(tmp_path / "model", tiny_model())
    relu_squared(monkeypatch)

    with pytest.raises(UserError, match="these compute another"):
        export_folder(folder, [f"--format={format}"])


def test_comparing_leaves_the_threads_as_they_were(monkeypatch):
    """It takes one of them alone: on a busy machine small matrices wait for the others."""
    counts, plain = [], GPT.forward

    def forward(self, *args, **options):
        counts.append(torch.get_num_threads())
        return plain(self, *args, **options)
    monkeypatch.setattr(GPT, "forward", forward)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = tiny_model()
        same_function.fingerprint(model)
        model.for_generation(CPU, torch.float32)
        assert counts and set(counts) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
