"""The model: transformers' Arcee as referee, causality, document masks, loss, gradients."""
import math

import pytest
import torch
from torch.nn import functional as F

from minillm.attention import document_mask, rope_table
from minillm.device import compile_for_training
from minillm.errors import UserError
from minillm.speed.cross_entropy import LinearCrossEntropy
from model import GPT, GPTConfig
from support.tiny_models import tiny_model

SMALL = dict(block_size=48, vocab_size=211, n_layer=3, n_head=6, n_kv_head=2, n_embd=96)


def small(**changes):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SMALL | changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:                  # a norm of ones would hide a norm forgotten
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "router" not in name:
            parameter.data.mul_(4)               # so that attention is far from uniform
    return model


def arcee_config(transformers, c):
    """transformers' configuration of the same model."""
    return transformers.ArceeConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size, rms_norm_eps=1e-6,
        hidden_act="silu", tie_word_embeddings=True, attention_bias=c.bias, mlp_bias=c.bias,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})


def arcee_weights(model):
    """The model's weights under transformers' names."""
    c, ours, theirs = model.config, model.state_dict(), {}
    theirs["model.embed_tokens.weight"] = theirs["lm_head.weight"] = ours["wte.weight"]
    theirs["model.norm.weight"] = ours["norm.weight"]
    head_dim = c.n_embd // c.n_head
    widths = [c.n_head * head_dim, c.n_kv_head * head_dim, c.n_kv_head * head_dim]
    for i in range(c.n_layer):
        here, there = f"blocks.{i}.", f"model.layers.{i}."
        theirs[there + "input_layernorm.weight"] = ours[here + "attn_norm.weight"]
        theirs[there + "post_attention_layernorm.weight"] = ours[here + "ffn_norm.weight"]
        for kind in ("weight", "bias") if c.bias else ("weight",):
            qkv = ours[here + f"attn.qkv.{kind}"].split(widths)
            for name, part in zip("qkv", qkv):
                theirs[there + f"self_attn.{name}_proj.{kind}"] = part
            theirs[there + f"self_attn.o_proj.{kind}"] = ours[here + f"attn.proj.{kind}"]
            theirs[there + f"mlp.up_proj.{kind}"] = ours[here + f"ffn.up.{kind}"]
            theirs[there + f"mlp.down_proj.{kind}"] = ours[here + f"ffn.down.{kind}"]
    return theirs


@pytest.mark.parametrize("bias", [False, True])
def test_equals_transformers_arcee(bias):
    """The same weights in transformers' Arcee (RMSNorm, RoPE, GQA, an FFN without gate)."""
    transformers = pytest.importorskip("transformers")
    model = small(bias=bias, rope_theta=500.0, n_inner=200)
    reference = transformers.ArceeForCausalLM(arcee_config(transformers, model.config)).eval()
    reference.load_state_dict(arcee_weights(model))
    idx = torch.randint(SMALL["vocab_size"], (3, 48))

    with torch.no_grad():
        logits, expected = model(idx), reference(idx).logits

    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_parameter_counts():
    """171M for the dense model of config/pretrain.py."""
    with torch.device("meta"):                   # allocates nothing
        total, active = GPT(GPTConfig()).n_params()
    assert total == active and abs(total / 171e6 - 1) < 0.01


@pytest.mark.parametrize("n_expert", [0, 4])
def test_causal(n_expert):
    """Another token at position t changes no logit before t, and does change those of t."""
    model = small(n_expert=n_expert, n_expert_per_tok=2)
    idx = torch.randint(SMALL["vocab_size"], (2, 48))
    with torch.no_grad():
        before = model(idx)
        for t in (0, 1, 17, 47):
            other = idx.clone()
            other[:, t] = (other[:, t] + 1) % SMALL["vocab_size"]
            after = model(other)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("n_expert", [0, 4])
@torch.no_grad()
def test_packed_rows_give_every_document_its_loss_alone(n_expert):
    """Documents that share a row under document_mask have the losses of rows of their own."""
    model = small(n_expert=n_expert, n_expert_per_tok=2)
    lengths = (5, 1, 20, 12, 6)
    documents = [torch.randint(1, SMALL["vocab_size"], (length,)) for length in lengths]
    rows = [F.pad(document, (0, 1)) for document in documents]       # <|endoftext|> is 0
    packed = torch.cat(rows)
    packed = F.pad(packed, (0, 49 - len(packed)))[None]
    x = packed[:, :-1]
    mask = document_mask(x)

    logits = model(x, attn_mask=mask)[0]

    start = 0
    for row in rows:
        end = start + len(row) - 1
        alone, targets = row[None, :-1], row[None, 1:]
        torch.testing.assert_close(logits[start:end], model(alone)[0], atol=2e-5, rtol=0)
        only_its_own = torch.full_like(x, -1)
        only_its_own[:, start:end] = targets
        loss, _ = model(x, only_its_own, mask)
        expected, _ = model(alone, targets)
        torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-5)
        start += len(row)
    # without the mask they would see one another
    assert (model(x)[0][30] - logits[30]).abs().max() > 1e-2


def test_flex_attention_sees_what_the_dense_mask_shows():
    """The mask for the compiled GPU kernel; the kernel's result, also without a backward pass."""
    model = small()
    idx = torch.randint(1, SMALL["vocab_size"], (4, 48))
    idx[torch.rand(idx.shape) < 0.1] = 0
    dense, flex = document_mask(idx), document_mask(idx, flex=True)
    row, query, key = torch.arange(4), torch.arange(48), torch.arange(48)
    seen = flex.mask_mod(row[:, None, None], 0, query[:, None], key)
    assert torch.equal(seen, dense[:, 0])

    with torch.no_grad():
        expected = model(idx, attn_mask=dense)
        try:
            logits = torch.compile(model, dynamic=False)(idx, attn_mask=flex)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            pytest.skip(f"no flex_attention on this CPU: {error}"[:200])

    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_targets_of_minus_one_are_not_learned():
    model = small()
    idx, targets = torch.randint(1, 200, (2, 48)), torch.randint(1, 200, (2, 48))
    targets[:, ::3] = -1

    loss, _ = model(idx, targets)

    log_p = model(idx).log_softmax(-1)
    log_p = log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(loss, -log_p[targets >= 0].sum())


def test_a_batch_without_targets_has_a_loss_of_0():
    model = small()
    idx = torch.randint(1, 200, (2, 48))

    loss, _ = model(idx, torch.full_like(idx, -1))
    loss.backward()

    assert loss == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_dropout_is_training_only():
    model = small(dropout=0.3)
    idx = torch.randint(1, 200, (2, 48))
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_gradients_in_bfloat16_are_near_float64():
    """Autocast's gradients differ from float64's by bfloat16 rounding, not more."""
    model, exact = small(), small().double()
    idx, targets = torch.randint(1, 200, (4, 48)), torch.randint(1, 200, (4, 48))

    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(idx, targets)
    loss.backward()

    expected, _ = exact(idx, targets)
    expected.backward()
    assert abs(loss.item() / expected.item() - 1) < 0.01
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert (p.grad - q.grad).norm() < 0.06 * q.grad.norm(), name


def test_the_angles_of_far_positions_are_exact():
    """At position 100,000 an angle in float32 would be off by up to 0.004."""
    table = rope_table(GPTConfig(**SMALL | dict(block_size=100_001)))

    assert table.dtype == torch.float32 and table.shape == (2, 100_001, 8)
    for i in range(8):
        angle = 100_000 * 10000.0 ** (-i / 8)
        expected = [math.cos(angle), math.sin(angle)]
        assert table[:, -1, i].tolist() == pytest.approx(expected, abs=1e-6)


def plain_cross_entropy(x, weight, targets):
    logits = x @ weight.t()
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def test_linear_cross_entropy_is_cross_entropy():
    """The loss and both gradients in float64; some rows have no target, the loss is scaled."""
    torch.manual_seed(0)
    x = (4 * torch.randn(30, 24, dtype=torch.float64)).requires_grad_()
    weight = (4 * torch.randn(70, 24, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(-1, 70, (30,))
    targets[:4] = torch.tensor([-1, 0, 69, -1])

    ours, theirs = [], []
    for results, loss_of in ((ours, LinearCrossEntropy.apply), (theirs, plain_cross_entropy)):
        loss = loss_of(x, weight, targets)
        results += [loss, *torch.autograd.grad(loss * 0.37, (x, weight))]

    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("confidence", [0.2, 1.0, 4.0])
def test_linear_cross_entropy_of_a_confident_model(confidence):
    """Compiled, in bfloat16, with probabilities near 1: as near to float64 as F.cross_entropy."""
    torch.manual_seed(2)
    weight = torch.randn(300, 64)
    targets = torch.randint(0, 300, (200,))
    x = (torch.randn(200, 64) + confidence * weight[targets]).bfloat16().requires_grad_()
    weight = weight.bfloat16().requires_grad_()
    row = torch.arange(200)
    with torch.no_grad():
        # both round their logits to bfloat16, so the exact gradients start from there
        logits = (x @ weight.t()).double()
    grad_logits = logits.softmax(-1)
    # p - 1 of the target, without cancellation
    grad_logits[row, targets] = -(grad_logits.sum(-1) - grad_logits[row, targets])
    exact = grad_logits @ weight.detach().double(), grad_logits.t() @ x.detach().double()
    compiled = torch.compile(LinearCrossEntropy.apply, fullgraph=True)

    loss = compiled(x, weight, targets)
    ours = torch.autograd.grad(loss, (x, weight))
    theirs = torch.autograd.grad(plain_cross_entropy(x, weight, targets), (x, weight))

    for our, their, expected in zip(ours, theirs, exact):
        error, their_error = (our.double() - expected).norm(), (their.double() - expected).norm()
        assert error <= 1.2 * their_error + 1e-3 * expected.norm()
    expected = F.cross_entropy(logits, targets, reduction="sum").item()
    assert loss.item() == pytest.approx(expected, abs=1e-3 + 1e-4 * expected, rel=0)


@pytest.mark.gpu
@pytest.mark.parametrize("n_expert", [0, 4])
@pytest.mark.parametrize("compiled", [True, False])
def test_gradients_of_a_step_on_a_gpu(n_expert, compiled):
    """Against float64, in bfloat16: as train.py compiles it with LinearCrossEntropy, and plain.

    All experts are chosen, without noise.
    """
    shape = dict(n_expert=n_expert, n_expert_per_tok=4, n_embd=64, n_head=4, n_inner=64,
                 n_kv_head=2)
    model, exact = small(**shape).cuda().use_fast(compiled), small(**shape).double().cuda()
    step = compile_for_training(model, torch.device("cuda")) if compiled else model
    idx, targets = torch.randint(1, 200, (8, 48)).cuda(), torch.randint(-1, 200, (8, 48)).cuda()

    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = step(idx, targets)
    loss.backward()
    expected, _ = exact(idx, targets)
    expected.backward()

    assert abs(loss.item() / expected.item() - 1) < 0.01
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        if q.grad is not None:
            assert (p.grad - q.grad).norm() < 0.08 * q.grad.norm() + 1e-6, name


def test_compiles_whole():
    """fullgraph=True: no host synchronisation, no shape that depends on data."""
    model = small(n_layer=1).train()
    idx, targets = torch.randint(1, 200, (2, 48)), torch.randint(1, 200, (2, 48))
    loss, _ = torch.compile(model, fullgraph=True, dynamic=False)(idx, targets)
    torch.testing.assert_close(loss, model(idx, targets)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("changes, says", [
    (dict(n_embd=100), "not divisible by n_head=6"),
    (dict(n_kv_head=4), "not divisible by n_kv_head=4"),
    (dict(n_embd=90), "must be even"),
    (dict(n_layer=0), "n_layer=0"),
    (dict(dropout=1.0), "dropout"),
    (dict(n_expert=4, n_expert_per_tok=5), "must be between 1 and"),
    (dict(n_expert=4, n_inner=77), "multiples of 8"),
], ids=str)
def test_shapes_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        GPTConfig(**SMALL | changes)


def test_flops_per_token():
    """6 × the parameters without norms + 6 × layers × T × width."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    norms = 25 * 1024
    assert model.flops_per_token(512) == 6 * (model.n_params()[0] - norms) + 6 * 12 * 512 * 1024


def test_flops_of_an_moe_are_those_of_the_experts_that_a_token_visits():
    model = tiny_model(n_expert=4, n_expert_per_tok=1, n_embd=32)
    dense = tiny_model(n_embd=32, n_inner=model.config.n_inner)
    routers = 2 * model.config.n_layer * 32 * 4          # and their noise

    assert model.flops_per_token(48) == dense.flops_per_token(48) + 6 * routers
