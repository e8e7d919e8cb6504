"""A changed attention, training loop or log: what does not take part is named."""
import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

import model as model_file
import train
from minillm import attention, generation, same_function
from minillm.configurator import configure
from minillm.errors import UserError
from minillm.run_log import RunLog
from model import GPT
from support.model_changes import KINDS
from support.tiny_models import tiny_model
from support.training_runs import TINY, finish
from train import Settings

CPU = torch.device("cpu")


# ---- attention, whose formula has five places

def windowed(length):
    """A sliding window of so many tokens, in training alone."""
    def causal_attention(q, k, v, mask=None):
        near = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(1 - length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
    return causal_attention


def softer(plain):
    """`plain` attention at another temperature."""
    return lambda q, *args: plain(q / 2, *args)


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_attention_is_one_function(kind, capsys):
    same_function.check_attention(tiny_model(**KINDS[kind]), flex=True)

    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("length, block_size", [(4, 48), (30, 48), (256, 512), (900, 4096)])
def test_a_window_that_generation_lacks_is_named(length, block_size, monkeypatch, capsys):
    monkeypatch.setattr(model_file, "causal_attention", windowed(length))

    tiny_model(block_size=block_size).for_generation(CPU, torch.float32)

    err = capsys.readouterr().err
    assert "attention over a KV cache is another function" in err and "document mask" not in err


def test_a_change_that_generation_alone_has_is_named(monkeypatch, capsys):
    changed = softer(attention.cached_attention)
    monkeypatch.setattr(generation, "cached_attention", changed)

    same_function.check_attention(tiny_model())

    assert capsys.readouterr().err.count("over a KV cache is another function") == 1


@pytest.mark.parametrize("flex, named", [(False, "with a document mask"),
                                         (True, "with flex_attention")])
def test_a_branch_that_lacks_a_change_is_named(flex, named, monkeypatch, capsys):
    def causal_attention(q, k, v, mask=None):
        unchanged = isinstance(mask, BlockMask) if flex else isinstance(mask, torch.Tensor)
        return (plain if unchanged else softer(plain))(q, k, v, mask)
    plain = attention.causal_attention
    monkeypatch.setattr(model_file, "causal_attention", causal_attention)

    same_function.check_attention(tiny_model(), flex=True)

    assert f"attention {named} is another function" in capsys.readouterr().err


def test_attention_that_needs_a_gpu_stops_nothing(monkeypatch, capsys):
    """Training saves without a fingerprint, and a line says that nothing was compared."""
    def causal_attention(q, k, v, mask=None):
        raise RuntimeError("this kernel needs a GPU")
    monkeypatch.setattr(model_file, "causal_attention", causal_attention)
    model = tiny_model()

    same_function.check_attention(model)

    assert same_function.fingerprint(model) is None
    assert "not compared with itself: RuntimeError: this kernel" in capsys.readouterr().err


def test_an_embedding_of_another_size_hides_nothing(monkeypatch, capsys):
    """Of positions, say: decoding one token gets row 0."""
    def with_positions(self, config):
        init(self, config)
        self.positions = nn.Embedding(config.block_size, config.n_embd)

    def trunk(self, idx, rope, attend):
        with monkeypatch.context() as patch:
            added = self.wte(idx) + self.positions.weight[: idx.shape[1]]
            patch.setattr(self.wte, "forward", lambda idx: added)
            return plain(self, idx, rope, attend)
    init, plain = GPT.__init__, GPT.trunk
    monkeypatch.setattr(GPT, "__init__", with_positions)
    monkeypatch.setattr(GPT, "trunk", trunk)
    model = tiny_model()

    same_function.check_attention(model)

    said = capsys.readouterr().err
    assert same_function.fingerprint(model) is not None
    assert "attention over a KV cache is another function" in said
    assert "positions, cached_forward must do as well" in said


def test_attention_is_compared_under_deterministic_algorithms(capsys):
    torch.use_deterministic_algorithms(True)
    try:
        same_function.check_attention(tiny_model(), flex=True)
    finally:
        torch.use_deterministic_algorithms(False)

    assert capsys.readouterr().err == ""


# ---- the training loop

def test_training_compares_its_attention(data, tmp_path):
    def before():
        model_file.causal_attention = windowed(8)

    output = finish([*TINY, "--max_iters=1", "--eval_interval=0", f"--data_dir={data}",
                     f"--out_dir={tmp_path}/out"], before=before)

    assert "is another function than over a whole text" in output


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
