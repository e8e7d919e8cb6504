"""The dense model.

Against transformers' Arcee, causality, parameter counts, packed rows, document masks.
"""
import pytest
import torch
from torch.nn import functional as F

from minillm.errors import UserError
from minillm.attention import document_mask
from minillm.speed.cross_entropy import LinearCrossEntropy
from model import GPT, GPTConfig

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


@pytest.mark.parametrize("bias", [False, True])
def test_equals_transformers_arcee(bias):
    """The same weights in transformers' Arcee (RMSNorm, RoPE, GQA, an MLP without gate).

    The same logits to 1e-4.
    """
    transformers = pytest.importorskip("transformers")
    model = small(bias=bias, rope_theta=500.0, n_inner=200)
    c = model.config
    reference = transformers.ArceeForCausalLM(transformers.ArceeConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size, rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=True,
        attention_bias=bias, mlp_bias=bias, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})).eval()
    theirs, ours = {}, model.state_dict()
    theirs["model.embed_tokens.weight"] = theirs["lm_head.weight"] = ours["wte.weight"]
    theirs["model.norm.weight"] = ours["norm.weight"]
    width = c.n_embd // c.n_head
    for i in range(c.n_layer):
        here, there = f"blocks.{i}.", f"model.layers.{i}."
        theirs[there + "input_layernorm.weight"] = ours[here + "attn_norm.weight"]
        theirs[there + "post_attention_layernorm.weight"] = ours[here + "ffn_norm.weight"]
        for kind in ("weight", "bias")[: 1 + bias]:
            q, k, v = ours[here + f"attn.qkv.{kind}"].split([c.n_head * width, c.n_kv_head * width, c.n_kv_head * width])
            theirs |= {there + f"self_attn.{name}_proj.{kind}": part for name, part in (("q", q), ("k", k), ("v", v))}
            theirs[there + f"self_attn.o_proj.{kind}"] = ours[here + f"attn.proj.{kind}"]
            theirs[there + f"mlp.up_proj.{kind}"] = ours[here + f"ffn.up.{kind}"]
            theirs[there + f"mlp.down_proj.{kind}"] = ours[here + f"ffn.down.{kind}"]
    reference.load_state_dict(theirs)
    idx = torch.randint(c.vocab_size, (3, c.block_size))
    with torch.no_grad():
        logits, expected = model(idx), reference(idx).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_parameter_counts():
    """171 M for the dense model of config/pretrain.py.

    On the meta device, so that nothing is allocated.
    """
    with torch.device("meta"):
        total, active = GPT(GPTConfig()).n_params()
    assert total == active and abs(total / 171e6 - 1) < 0.01


@pytest.mark.parametrize("n_expert", [0, 4])
def test_causal(n_expert):
    """Another token at place t moves no logit before t, and does move those from t on."""
    model = small(n_expert=n_expert, n_expert_per_tok=2)
    idx = torch.randint(SMALL["vocab_size"], (2, 48))
    with torch.no_grad():
        before = model(idx)
        for t in (0, 1, 17, 47):
            other = idx.clone()
            other[:, t] = (other[:, t] + 1) % SMALL["vocab_size"]
            after = model(other)
            assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("n_expert", [0, 4])
def test_packed_rows_give_every_document_its_loss_alone(n_expert):
    """Documents that share a row under document_mask have the losses that they have in rows of their own."""
    model = small(n_expert=n_expert, n_expert_per_tok=2)
    documents = [torch.randint(1, SMALL["vocab_size"], (length,)) for length in (5, 1, 20, 12, 6)]
    rows = [torch.cat((document, torch.tensor([0]))) for document in documents]
    packed = torch.cat(rows)[None]
    packed = F.pad(packed, (0, 49 - packed.shape[1]))                # <|endoftext|> pads
    x, y = packed[:, :-1], packed[:, 1:].clone()
    with torch.no_grad():
        logits = model(x, mask=document_mask(x))[0]
        at = 0
        for row in rows:
            alone = model(row[None, :-1])[0]
            torch.testing.assert_close(logits[at: at + len(row) - 1], alone, atol=2e-5, rtol=0)
            expected, _ = model(row[None, :-1], row[None, 1:])
            mine = torch.full_like(y, -1)
            mine[0, at: at + len(row) - 1] = row[1:]
            loss, _ = model(x, mine, document_mask(x))
            torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-5)
            at += len(row)
        # without the mask they would see one another
        assert (model(x)[0][30] - logits[30]).abs().max() > 1e-2


def test_flex_attention_sees_what_the_dense_mask_shows():
    """The mask for the compiled GPU kernel, and that kernel's result, compiled without a backward pass too."""
    model = small()
    idx = torch.randint(1, SMALL["vocab_size"], (4, 48))
    idx[torch.rand(idx.shape) < 0.1] = 0
    dense, flex = document_mask(idx), document_mask(idx, flex=True)
    b, q, k = (torch.arange(n) for n in (4, 48, 48))
    assert torch.equal(flex.mask_mod(b[:, None, None], 0, q[:, None], k), dense[:, 0])
    with torch.no_grad():
        expected = model(idx, mask=dense)
        try:
            got = torch.compile(model, dynamic=False)(idx, mask=flex)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            pytest.skip(f"no flex_attention on this CPU: {error}"[:200])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_targets_of_minus_one_are_not_learned():
    model = small()
    idx, targets = torch.randint(1, 200, (2, 48)), torch.randint(1, 200, (2, 48))
    targets[:, ::3] = -1
    loss, _ = model(idx, targets)
    logits = model(idx)
    kept = targets >= 0
    expected = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0][kept].sum()
    torch.testing.assert_close(loss, expected)
    loss, _ = model(idx, torch.full_like(targets, -1))
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in model.parameters())


def test_dropout_is_training_only():
    model = small(dropout=0.3)
    idx = torch.randint(1, 200, (2, 48))
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_gradients_in_bfloat16_are_near_float64():
    """Autocast's gradients deviate from float64's by bfloat16 rounding, not more."""
    model = small()
    idx, targets = torch.randint(1, 200, (4, 48)), torch.randint(1, 200, (4, 48))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(idx, targets)
    loss.backward()
    exact = small().double()
    expected, _ = exact(idx, targets)
    expected.backward()
    assert abs(loss.item() / expected.item() - 1) < 0.01
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert (p.grad - q.grad).norm() < 0.06 * q.grad.norm(), name


def test_linear_cross_entropy_is_cross_entropy():
    """The loss and both gradients, a scale behind it, a row of large logits, and rows without a target among them."""
    x, weight = ((4 * torch.randn(n, 24, dtype=torch.float64)).requires_grad_() for n in (30, 70))
    targets = torch.randint(-1, 70, (30,))
    targets[:4] = torch.tensor([-1, 0, 69, -1])
    results = []
    for loss in (LinearCrossEntropy.apply(x, weight, targets), F.cross_entropy(x @ weight.t(), targets, ignore_index=-1, reduction="sum")):
        results.append((loss, *torch.autograd.grad(loss * 0.37, (x, weight))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("confidence", [0.2, 1.0, 4.0])
def test_linear_cross_entropy_of_a_confident_model(confidence):
    """Compiled, in bfloat16, with probabilities near 1.

    Loss and gradients as near to float64 as those of F.cross_entropy.
    """
    torch.manual_seed(2)
    weight = torch.randn(300, 64)
    targets = torch.randint(0, 300, (200,))
    x = torch.randn(200, 64) + confidence * weight[targets]
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()

    def gradients(f):
        x.grad = weight.grad = None
        f(x, weight, targets).backward()
        return x.grad.double(), weight.grad.double()

    def plain(x, weight, targets):
        return F.cross_entropy((x @ weight.t()).float(), targets, reduction="sum")
    with torch.no_grad():
        # rounded to bfloat16: this rounding is not to be blamed on either
        logits = (x @ weight.t()).double()
    p = logits.softmax(-1)
    p[torch.arange(200), targets] = -(p.sum(-1) - p[torch.arange(200), targets])
    exact = p @ weight.detach().double(), p.t() @ x.detach().double()
    ours, theirs = gradients(torch.compile(LinearCrossEntropy.apply, fullgraph=True)), gradients(plain)
    for a, b, c in zip(ours, theirs, exact):
        assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-3 * c.norm()
    expected = F.cross_entropy(logits, targets, reduction="sum").item()
    assert abs(torch.compile(LinearCrossEntropy.apply)(x, weight, targets).item() - expected) < 1e-3 + 1e-4 * expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("compiled", [True, False])
def test_gradients_of_a_step_on_a_gpu(experts, compiled):
    """In bfloat16, as train.py compiles it with LinearCrossEntropy, and without.

    Loss and gradients against float64. All experts are chosen, without noise.
    """
    from minillm.device import compile_for_training
    options = dict(n_expert=experts, n_expert_per_tok=4, n_embd=64, n_head=4, n_inner=64, n_kv_head=2)
    model, exact = small(**options).cuda().use_fast(compiled), small(**options).double().cuda()
    idx, targets = torch.randint(1, 200, (8, 48)).cuda(), torch.randint(-1, 200, (8, 48)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = (compile_for_training(model, torch.device("cuda")) if compiled else model)(idx, targets)
    expected, _ = exact(idx, targets)
    loss.backward(), expected.backward()
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


@pytest.mark.parametrize("changes, words", [
    (dict(n_embd=100), "not divisible by n_head=6"), (dict(n_kv_head=4), "not divisible by n_kv_head=4"), (dict(n_embd=90), "must be even"),
    (dict(n_layer=0), "n_layer=0"), (dict(dropout=1.0), "dropout"), (dict(n_expert=4, n_expert_per_tok=5), "must be between 1 and"),
    (dict(n_expert=4, n_inner=77), "multiples of 8")])
def test_shapes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        GPTConfig(**SMALL | changes)


def test_flops_per_token():
    """6 × (parameters without norms) + 6 · layers · T · width; for 12 × 1024 at 512.

    1.065 GFLOP.
    """
    with torch.device("meta"):
        model = GPT(GPTConfig())
    norms = 25 * 1024
    assert model.flops_per_token(512) == 6 * (model.n_params()[0] - norms) + 6 * 12 * 512 * 1024
