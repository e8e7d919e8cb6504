"""A model before its first step: how its weights are drawn, where it drops, its loss."""
import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, RMSNorm, cross_entropy
from support.tiny_models import tiny_model

SHAPE = dict(n_layer=8, n_head=4, n_kv_head=2, n_embd=128, block_size=32, vocab_size=500)


@pytest.mark.parametrize("n_expert", [0, 4])
def test_what_adds_to_the_residual_stream_starts_smaller(n_expert):
    """By the root of the number of sub-layers, 16: their sum keeps its size at any depth."""
    model = GPT(GPTConfig(n_expert=n_expert, **SHAPE))

    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "noise" in name:
            continue
        adds = name.endswith(("attn.proj.weight", "ffn.down.weight", "w2_EFD"))
        expected = 0.02 / 4 if adds else 0.02
        assert weight.std().item() == pytest.approx(expected, rel=0.1), name


def test_biases_start_at_0_and_norms_at_1():
    model = GPT(GPTConfig(bias=True, **SHAPE))

    vectors = {name: p for name, p in model.named_parameters() if p.dim() == 1}

    assert len(vectors) == 8 * (2 + 4) + 1
    for name, vector in vectors.items():
        assert (vector == (0 if name.endswith("bias") else 1)).all(), name


def drops(model):
    """The objects that say how much is dropped, and the attribute that says it."""
    places = [(model.config, "dropout")]
    for block in model.blocks:
        places += [(block.attn, "dropout"), (block.ffn.dropout, "p")]
    return places


@pytest.mark.parametrize("n_expert", [0, 4])
def test_the_embedding_and_every_sub_layer_drop_in_training_alone(n_expert):
    model = tiny_model(n_expert, dropout=0.5)
    for router in (block.ffn.router for block in model.blocks if n_expert):
        # so that dropout alone is random
        router.noisy_logits = lambda x_ND, router=router: x_ND @ router.weight_DE
    idx = torch.arange(20)[None]

    for place, attribute in drops(model):
        for other, name in drops(model):
            setattr(other, name, 0.5 if (other, name) == (place, attribute) else 0.0)
        assert not torch.equal(model.train()(idx), model(idx)), (place, attribute)
        assert torch.equal(model.eval()(idx), model(idx))


def test_the_loss_of_logits_in_bfloat16_is_computed_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(300, 16).bfloat16(), torch.randn(500, 16).bfloat16()
    targets = torch.randint(-1, 500, (300,))

    loss = cross_entropy(x, weight, targets)

    logits = F.linear(x, weight).double()
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_norm_of_bfloat16_is_computed_in_float32():
    """With a weight that bfloat16 does not hold."""
    torch.manual_seed(0)
    norm, x = RMSNorm(64), torch.randn(50, 64).bfloat16()
    norm.weight.data.uniform_(0.5, 1.5)

    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
