"""The table at the end of `make demo`."""
import json

import pytest
import torch

from eval import weights_id
from support.processes import finish, refused
from support.tiny_models import tiny_model

STEPS = [{"step": 0, "parameters": 90, "active_parameters": 70}, {"step": 9, "loss": 1.5}]
END = {"step": 10, "seconds": 61.2, "tokens": 5120, "active_parameters": 70}


@pytest.fixture
def demo(tmp_path):
    """Three finished runs, of which two were evaluated."""
    for stage in ("pretrain", "sft", "control"):
        folder = tmp_path / "out" / f"demo_{stage}"
        folder.mkdir(parents=True)
        records = [*STEPS, {"step": 10, "val_loss": 1.25}, END]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for stage, share in (("sft", 0.987), ("control", 0.02)):
        results = {"step": 10, "questions_file": "demo", "exact_match": share}
        (tmp_path / f"out/demo_{stage}/eval.json").write_text(json.dumps(results))
    return tmp_path


def test_a_row_for_each_run(demo):
    rows = [line.split() for line in finish("demo.report", ["demo"], folder=demo).splitlines()]

    assert ["pretraining", "70", "5,120", "61", "1.5000", "1.2500"] in rows
    assert ["SFT", "70", "5,120", "61", "1.5000", "1.2500", "98.7%"] in rows
    assert ["control:", "SFT", "alone", "70", "5,120", "61", "1.5000", "1.2500", "2.0%"] in rows


@pytest.mark.parametrize("change", [
    {"step": 9},                                     # the run was resumed, and not evaluated again
    {"questions_file": "mine.jsonl"},
    {"exact_match": None, "questions_file": None}])
def test_another_evaluation_is_not_shown(demo, change):
    path = demo / "out/demo_sft/eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    output = finish("demo.report", ["demo"], folder=demo)

    assert "98.7%" not in output and "2.0%" in output
    stale = finish("demo.report", ["demo", "stale"], folder=demo)
    assert stale.split() == ["out/demo_sft/eval.json"]


def test_what_the_table_can_use_is_not_stale(demo):
    (demo / "out/demo_control/metrics.jsonl").write_text(json.dumps(STEPS[1]) + "\n")

    assert finish("demo.report", ["demo", "stale"], folder=demo).split() == []


def test_a_demo_that_has_not_ended(demo):
    (demo / "out/demo_sft/metrics.jsonl").write_text(json.dumps(STEPS[1]) + "\n")
    assert "out/demo_sft has not ended" in refused("demo.report", [], folder=demo)
    line = refused("demo.report", ["demo_moe"], folder=demo)
    assert "cannot read out/demo_moe_pretrain/metrics.jsonl" in line


def test_the_same_weights_are_known_in_any_number_type():
    """On a GPU they are bfloat16: eval.json of a CPU is of the same model."""
    known = {weights_id(tiny_model().to(dtype)) for dtype in (torch.float32, torch.bfloat16)}

    assert len(known) == 1
    assert weights_id(tiny_model(seed=1)) not in known
