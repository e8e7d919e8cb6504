"""Which file of a folder is opened, and what its model_config may say."""
import pytest
import torch

from minillm import checkpoint
from minillm.checkpoint import best_path, model_config, paths_of, saved_steps, step_path
from minillm.errors import UserError
from model import GPTConfig

CONFIG = dict(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_kv_head=1, n_embd=8)


def folder_with(folder, *names):
    for name in names:
        (folder / name).touch()
    return str(folder)


def test_steps_of_any_length_are_in_order_and_other_names_are_none(tmp_path):
    """A name has at least eight digits, and more where the step has."""
    folder = folder_with(tmp_path, "ckpt_00000005.pt", "ckpt_123456789.pt", "ckpt_99999999.pt",
                         "ckpt_5.pt", "ckpt_00000006.pt.tmp", "ckpt_00000007.pt.damaged", "best.pt")

    assert saved_steps(folder) == [123456789, 99999999, 5]
    assert step_path(folder, 123456789) == f"{folder}/ckpt_123456789.pt"


def test_the_newest_are_tried_from_the_newest_on(tmp_path):
    folder = folder_with(tmp_path, "ckpt_00000005.pt", "ckpt_00000010.pt", "best.pt")

    assert paths_of(folder) == [step_path(folder, 10), step_path(folder, 5)]
    assert paths_of(folder, "best") == [best_path(folder)]
    assert paths_of(folder, 5) == [step_path(folder, 5)]


def test_best_stands_in_where_there_is_nothing_else(tmp_path):
    folder = folder_with(tmp_path, "best.pt")

    assert paths_of(folder) == [best_path(folder)]


def test_a_damaged_newest_is_named_on_stderr(tmp_path, capsys):
    """stdout belongs to the text that sample.py makes, and to the JSON of eval.py."""
    whole = {"model": {}, "model_config": {}, "step": 5, "tokenizer_hash": ""}
    checkpoint.save(step_path(tmp_path, 5), whole)
    folder = folder_with(tmp_path, "ckpt_00000010.pt")

    loaded = checkpoint.load_for_inference(folder)

    out, err = capsys.readouterr()
    assert (loaded["step"], out) == (5, "")
    assert "ckpt_00000010.pt" in err and "using the checkpoint before it" in err


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    folder = folder_with(tmp_path, "ckpt_00000005.pt", "best.pt")

    with pytest.raises(UserError, match="no checkpoint of step 7 in .*; there are 5, best"):
        paths_of(folder, "7")


def state(**changes):
    return {"path": "f.pt", "model_config": CONFIG | changes,
            "model": {"wte.weight": torch.zeros(20, 8)}}


def test_a_whole_number_will_do_for_a_fraction():
    config = model_config(state(rope_theta=10000, dropout=0), GPTConfig)

    assert (type(config.rope_theta), type(config.dropout)) == (float, float)
    assert config == GPTConfig(**CONFIG)


@pytest.mark.parametrize("changes, says", [
    (dict(rope_theta=float("inf")), "rope_theta=inf, which is no finite number"),
    (dict(dropout=float("nan")), "dropout=nan, which is no finite number"),
    (dict(rope_theta=0.5), "rope_theta=0.5, which must be at least 1"),
    (dict(n_layer=2), "n_layer=2, but the file holds only 1 tensors"),
    (dict(n_layer=True), "n_layer=True, which is not of type int"),
    (dict(n_layer=2**41), "n_layer=.*, which is too large"),
    (dict(n_embd=16), "wte.weight is torch.float32 of shape"),
    (dict(gated=True), "an unknown key 'gated'"),
], ids=str)
def test_a_config_that_no_model_has_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        model_config(state(**changes), GPTConfig)


@pytest.mark.parametrize("weight, says", [
    (torch.zeros(20, 8, dtype=torch.int8), "is torch.int8"),
    (torch.zeros(20, 8).to_sparse(), "holds no plain numbers"),
    (torch.zeros(20, 8, device="meta"), "holds no plain numbers"),
    ("text", "is missing")], ids=["whole numbers", "sparse", "meta", "text"])
def test_weights_are_plain_fractions(weight, says):
    wrong = state()
    wrong["model"]["wte.weight"] = weight

    with pytest.raises(UserError, match=f"wte.weight {says}"):
        model_config(wrong, GPTConfig)


def test_interrupting_a_save_leaves_no_file_behind(tmp_path, monkeypatch):
    """Ctrl-C twice, while it writes."""
    def interrupt(state, file):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", interrupt)

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(str(tmp_path / "a.pt"), {})

    assert list(tmp_path.iterdir()) == []
