"""--activation_checkpointing=True: the same gradients from fewer kept activations."""
import pytest
import torch

from minillm.activation_checkpointing import checkpoint_blocks
from minillm.attention import document_mask
from minillm.speed import parts
from model import GPT, GPTConfig
from support.compiled import count_graphs
from support.training_runs import (MOE, SHORT, assert_same_run, finish, finish_ranks, make_data)

SHAPE = dict(n_layer=4, n_head=2, n_kv_head=1, n_embd=32, block_size=32, vocab_size=300,
             dropout=0.1)
EXPERTS = dict(n_expert=4, n_expert_per_tok=2, n_inner=48)
SHAPES = {"dense": SHAPE, "MoE": SHAPE | EXPERTS}


def eager(model, monkeypatch):
    return model


def compiled(model, monkeypatch):
    """As one graph, which torch's partitioner cuts into a forward and a backward pass."""
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition")


def compiled_in_parts(model, monkeypatch):
    """As on several processes."""
    torch._dynamo.reset()
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: torch_compile(
        f, fullgraph=True, backend="aot_eager_decomp_partition"))
    parts.compile_in_parts(model, torch.device("cpu"))
    return model


def kept_bytes(model, forward, idx):
    """Train on a batch, and return the bytes that the forward pass keeps, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, stats = forward(idx, idx, document_mask(idx))
        total = sum(kept.values())
        objective = loss
        if stats:
            objective = objective + stats[0]
        objective.backward()
    return loss.item(), total


@pytest.mark.parametrize("wrap", [eager, compiled, compiled_in_parts], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_are_the_same_bits_from_less_memory(monkeypatch, kind, wrap):
    """With dropout and router noise, over two batches."""
    batches = torch.randint(1, 300, (2, 3, 32), generator=torch.Generator().manual_seed(1))
    batches[0, :, 10] = batches[1, 0, 20] = 0

    found = {}
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SHAPES[kind])).use_fast()
        if checkpointed:
            checkpoint_blocks(model)
        with monkeypatch.context() as patch:
            forward = wrap(model, patch)
            results = []
            for number, idx in enumerate(batches):
                torch.manual_seed(number)
                results.append(kept_bytes(model, forward, idx))
        losses, sizes = zip(*results)
        found[checkpointed] = losses, [p.grad for p in model.parameters()], sizes

    plain_losses, plain_gradients, plain_bytes = found[False]
    losses, gradients, kept = found[True]
    assert losses == plain_losses
    for ours, wanted in zip(gradients, plain_gradients, strict=True):
        assert torch.equal(ours, wanted)
    assert max(kept) < min(plain_bytes) / 2


def test_parts_of_the_same_shape_still_share_a_graph(monkeypatch):
    graphs = count_graphs(monkeypatch)
    model = GPT(GPTConfig(**SHAPE))
    checkpoint_blocks(model)
    idx = torch.ones(2, 32, dtype=torch.long)

    parts.compile_in_parts(model, torch.device("cpu"))
    model(idx, idx)[0].backward()

    assert len(graphs) == 4                      # embedding, block, norm, loss


@pytest.mark.parametrize("flags", [[], [*MOE, "--optimizer=muon"], ["--dtype=bfloat16"]],
                         ids=["dense", "MoE", "bf16"])
def test_a_run_is_the_same(tmp_path, flags):
    data = make_data(tmp_path / "data")
    argv = [*SHORT, *flags, f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/plain"])

    finish([*argv, "--activation_checkpointing=True", f"--out_dir={tmp_path}/checkpointed"])

    assert_same_run(tmp_path / "plain", tmp_path / "checkpointed")


def test_two_processes_run_the_same(tmp_path):
    """With DDP and several micro-steps, the optimizer's state in shares."""
    data = make_data(tmp_path / "data")
    argv = [*SHORT, *MOE, "--gradient_accumulation_steps=4", f"--data_dir={data}"]
    finish_ranks(2, [*argv, f"--out_dir={tmp_path}/plain"])

    finish_ranks(2, [*argv, "--activation_checkpointing=True", "--shard=True",
                     f"--out_dir={tmp_path}/checkpointed"])

    assert_same_run(tmp_path / "plain", tmp_path / "checkpointed")
