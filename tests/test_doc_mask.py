"""doc_mask=auto: attention stays inside a document for SFT data, unless told otherwise."""
import json
import os

import pytest

from minillm import run_folder
from support import ROOT, processes
from support.training_runs import finish, make_data

ARGV = ["--block_size=32", "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16",
        "--batch_size=2", "--max_iters=2", "--eval_interval=0", "--log_interval=1", "--device=cpu",
        "--dtype=float32"]


@pytest.mark.parametrize("kind, flags, expected", [
    ("sft", [], True), ("sft", ["--doc_mask=auto"], True), ("sft", ["--doc_mask=False"], False),
    ("pretrain", [], False), ("pretrain", ["--doc_mask"], True)])
def test_the_kind_of_data_decides(tmp_path, kind, flags, expected):
    data = make_data(tmp_path / "data", kind)
    argv = [*ARGV, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]

    output = finish([*argv, *flags])

    settings = run_folder.read_settings(tmp_path / "out", doc_mask=bool)
    assert settings["doc_mask"] is expected
    said = f"doc_mask={expected}, because {data} holds {kind} data" in output
    assert said == (flags in ([], ["--doc_mask=auto"]))


def test_the_moe_demo_pretrains_inside_documents(tmp_path):
    """What else would tell one biography's name from the next's is how near it is, and SFT's chats
    put the name far from the answer: some runs then lost up to 8% of the facts (LOG.md)."""
    data = make_data(tmp_path / "data", "pretrain")
    config = os.path.join(ROOT, "config/demo_moe_pretrain.py")

    finish([config, *ARGV, f"--data_dir={data}", f"--out_dir={tmp_path}/out"])

    assert run_folder.read_settings(tmp_path / "out", doc_mask=bool)["doc_mask"] is True


def test_a_resumed_run_keeps_its_own(tmp_path):
    data = make_data(tmp_path / "data", "sft")
    argv = [*ARGV, f"--data_dir={data}", f"--out_dir={tmp_path}/out"]
    finish([*argv, "--doc_mask=False"])

    finish([*argv, "--init_from=resume", "--max_iters=3"])

    assert run_folder.read_settings(tmp_path / "out", doc_mask=bool)["doc_mask"] is False


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data of both kinds, a run on each, and one on text with the mask."""
    folder = tmp_path_factory.mktemp("runs")
    for name, kind, flags in (("pretrain", "pretrain", []), ("sft", "sft", []),
                              ("masked", "pretrain", ["--doc_mask"])):
        make_data(folder / "data" / name, kind)
        finish([*ARGV, f"--data_dir={folder}/data/{name}", f"--out_dir={folder}/{name}", *flags])
    return folder


def evaluate(folder, run, data, *flags):
    """(the results, the line of text about them)"""
    argv = [f"--out_dir={run}", "--device=cpu", "--dtype=float32", "--questions=none", *flags]
    if data:
        argv.append(f"--data_dir=data/{data}")
    output = processes.finish("eval", argv, folder=folder)
    results = json.loads((folder / run / "eval.json").read_text())
    return results, next(line for line in output.splitlines() if " tokens" in line)


@pytest.mark.parametrize("run, data, expected", [
    ("pretrain", None, False), ("pretrain", "pretrain", False), ("pretrain", "sft", True),
    ("sft", None, True), ("sft", "sft", True), ("sft", "pretrain", False),
    ("masked", None, True), ("masked", "masked", True), ("masked", "pretrain", False)])
def test_a_model_is_scored_as_trained_on_its_own_data_and_elsewhere_by_kind(runs, run, data,
                                                                            expected):
    """So numbers of two models on the same text compare, before SFT and after it."""
    auto, line = evaluate(runs, run, data)
    same, _ = evaluate(runs, run, data, f"--doc_mask={expected}")
    other, other_line = evaluate(runs, run, data, f"--doc_mask={not expected}")

    assert auto["doc_mask"] is expected and other["doc_mask"] is not expected
    assert auto["loss"] == same["loss"] != other["loss"]
    assert ("tokens, documents masked: loss" in line) == expected
    assert ("tokens, documents masked: loss" in other_line) != expected
