"""A model compiled in parts, as several processes train it, computes what the plain one does."""
from functools import partial

import pytest
import torch

import train
from minillm.attention import document_mask
from minillm.speed import parts
from model import GPT, GPTConfig
from support.compiled import call_with_graphs, count_graphs
from support.training_runs import MOE, TINY, finish, finish_ranks, make_data, numbers

SHAPE = dict(n_layer=4, n_head=2, n_kv_head=1, n_embd=32, block_size=32, vocab_size=300)
EXPERTS = dict(n_expert=4, n_expert_per_tok=2, n_inner=48)


def loss_and_gradients(model, idx):
    loss, stats = model(idx, idx, document_mask(idx))
    objective = loss
    if stats:
        objective = objective + stats[0]
    objective.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss, gradients


@pytest.mark.parametrize("shape", [SHAPE, SHAPE | EXPERTS], ids=["dense", "MoE"])
def test_parts_compute_what_the_whole_computes(monkeypatch, shape):
    """Also on a second batch, whose mask is another; and parts of the same shape share a graph."""
    graphs = count_graphs(monkeypatch)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape)).eval()       # eval: the router draws no noise
    batches = torch.randint(1, 300, (2, 2, 32))
    batches[0, :, 10] = batches[1, 0, 20] = 0
    expected = [loss_and_gradients(model, idx) for idx in batches]

    parts.compile_in_parts(model, torch.device("cpu"))
    found = [loss_and_gradients(model, idx) for idx in batches]

    torch.testing.assert_close(found, expected)
    assert len(graphs) == 4                      # embedding, block, norm, loss


@pytest.mark.parametrize("training", [True, False])
def test_the_trunk_drops_and_rounds_as_the_plain_one(training):
    """Dropout in training alone; under autocast the residual stream is in bfloat16."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, dropout=0.5)).train(training)
    idx = torch.randint(1, 300, (2, 32))
    in_parts = partial(parts.trunk, model, model.embed, parts.run_block, model.norm)
    found = []
    for function in (model.trunk, in_parts):
        model.trunk = function
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(idx))

    assert torch.equal(*found)


def losses(records):
    """The loss of each step, and of each validation."""
    return [record.get("loss", record.get("val_loss")) for record in records]


def test_two_processes_compile_sft_and_learn_what_one_learns(tmp_path):
    """SFT inside documents, validation, DDP and torch.compile together: a plain run's curve."""
    data = make_data(tmp_path / "data", "sft")
    argv = [*TINY, "--doc_mask=True", "--dropout=0", "--max_iters=4", "--eval_interval=2",
            f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/plain"])

    finish_ranks(2, [*argv, "--compile=True", f"--out_dir={tmp_path}/compiled"])

    plain, compiled = numbers(tmp_path / "plain"), numbers(tmp_path / "compiled")
    assert [r["step"] for r in compiled] == [r["step"] for r in plain]
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def note_graphs(path):
    """In the child: write a line to `path` for every graph that is compiled."""
    def note(graph):
        with open(path, "a") as file:
            file.write("graph\n")
    call_with_graphs(pytest.MonkeyPatch(), note)


def note_validation(path):
    """In the child: write to `path` whether a validation keeps gradients. Nothing is compiled."""
    inner = train.validation_loss

    def validation_loss(*arguments):
        with open(path, "w") as file:
            file.write(str(torch.is_grad_enabled()))
        return inner(*arguments)
    train.validation_loss = validation_loss
    train.compile_for_training = lambda model, device: model


COMPILED = ["--compile=True", "--dropout=0"]


@pytest.mark.parametrize("flags, keeps", [
    (["--dropout=0"], False), (COMPILED, True), ([*COMPILED, "--dropout=0.1"], False),
    ([*COMPILED, *MOE], False), ([*COMPILED, "--fp8=True", "--dtype=bfloat16"], False)],
    ids=["not compiled", "no noise", "dropout", "router noise", "8 bits"])
def test_validation_keeps_gradients_only_to_share_a_graph(data, tmp_path, flags, keeps):
    """They cost memory; and what it computes must be what training computes."""
    finish([*TINY, *flags, "--max_iters=1", f"--data_dir={data}", f"--out_dir={tmp_path}/out"],
           before=partial(note_validation, f"{tmp_path}/keeps"))

    assert open(f"{tmp_path}/keeps").read() == str(keeps)


@pytest.mark.parametrize("flags, count", [
    (["--dropout=0"], 1), ([], 2), (["--dropout=0", *MOE], 2)],
    ids=["no noise", "dropout", "router noise"])
def test_validation_compiles_only_what_training_does_not_compute(data, tmp_path, flags, count):
    """Without noise it is the training step's graph; with noise it computes without."""
    argv = [*TINY, *flags, "--max_iters=4", "--eval_interval=2", f"--data_dir={data}"]
    finish([*argv, f"--out_dir={tmp_path}/plain"])

    finish([*argv, "--compile=True", f"--out_dir={tmp_path}/compiled"],
           before=partial(note_graphs, f"{tmp_path}/graphs"))

    assert open(f"{tmp_path}/graphs").read() == "graph\n" * count
    plain, compiled = numbers(tmp_path / "plain"), numbers(tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
