"""The JSON files of an export for transformers, by what they say; test_export.py opens them."""
import json
import os

import pytest
import torch

from minillm import checkpoint
from minillm.errors import UserError
from minillm.export_hf import read_model
from minillm.sampling_params import DEFAULTS
from minillm.tokenizer import END_OF_TEXT, IM_END, IM_START
from support.exports import export_folder
from support.tiny_models import tiny_model, write_folder

safetensors = pytest.importorskip("safetensors.torch")


def exported(folder, *argv, **shape):
    """(the model, the folder that export.py made of it)"""
    model = tiny_model(**shape)
    return model, export_folder(write_folder(folder / "model", model), argv)


def read(made, name):
    with open(f"{made}/{name}", encoding="utf-8") as file:
        return json.load(file)


def test_transformers_generates_as_chat_does_without_flags(tmp_path):
    _, made = exported(tmp_path)

    assert read(made, "generation_config.json") == {
        "do_sample": True, "temperature": DEFAULTS.temperature, "top_k": DEFAULTS.top_k,
        "max_new_tokens": DEFAULTS.max_new_tokens,
        "eos_token_id": [IM_END, END_OF_TEXT, IM_START], "pad_token_id": END_OF_TEXT}


@pytest.mark.parametrize("flags, step", [([], 9), (["--checkpoint=7"], 7)])
def test_the_checkpoint_that_is_asked_for_is_exported(tmp_path, flags, step):
    """The newest, or another one."""
    folder = write_folder(tmp_path / "model", tiny_model())
    state = checkpoint.load(checkpoint.step_path(folder, 7))
    norms = {7: state["model"]["norm.weight"].clone(), 9: state["model"]["norm.weight"].mul_(2)}
    checkpoint.save(checkpoint.step_path(folder, 9), state | {"step": 9})

    made = export_folder(folder, flags)

    assert torch.equal(read_model(made)["model"]["norm.weight"], norms[step])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_context_rope_and_dtype_are_said_for_every_version(tmp_path, dtype):
    """transformers 4 reads rope_theta at the top, 5 in rope_parameters."""
    model, made = exported(tmp_path, f"--dtype={dtype}", rope_theta=5e5, block_size=96)

    config = read(made, "config.json")

    assert config["torch_dtype"] == dtype
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["max_position_embeddings"] == 96
    assert read(made, "tokenizer_config.json")["model_max_length"] == 96
    assert config["initializer_range"] == model.config.init_std
    ends = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert ends == [None, IM_END, END_OF_TEXT]


def test_the_weights_are_marked_as_those_of_torch(tmp_path):
    """transformers 4 opens no others."""
    _, made = exported(tmp_path)

    with safetensors.safe_open(f"{made}/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("without", ["rope_theta", "rope_parameters"])
def test_the_config_of_either_version_is_read_back(tmp_path, without):
    """Also from an editor that puts a byte-order mark before it."""
    _, made = exported(tmp_path, rope_theta=5e5, bias=True)
    config = read(made, "config.json")
    del config[without]
    with open(f"{made}/config.json", "w", encoding="utf-8-sig") as file:
        json.dump(config, file)

    found = read_model(made)["model_config"]

    assert (found["rope_theta"], found["bias"]) == (5e5, True)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_longer_rope_is_refused_under_either_name(tmp_path, key):
    _, made = exported(tmp_path)
    config = read(made, "config.json")
    del config["rope_parameters"]
    with open(f"{made}/config.json", "w") as file:
        json.dump(config | {key: {"rope_type": "yarn", "rope_theta": 1e4}}, file)

    with pytest.raises(UserError, match="rope_type is 'yarn'"):
        read_model(made)


def test_a_router_has_no_noise_where_nobody_saved_one(tmp_path):
    """transformers' save_pretrained leaves training.safetensors out."""
    model, made = exported(tmp_path, n_expert=4)
    os.remove(f"{made}/training.safetensors")

    found = read_model(made)["model"]

    assert found.keys() == model.state_dict().keys()
    for name, weight in found.items():
        assert not weight.any() if "noise" in name else weight.any()


@pytest.mark.parametrize("name, says", [
    ("up_proj.bias", "the FFN has a gate"), ("gate_proj.bias", "the FFN has biases")])
def test_a_llama_whose_biases_are_not_those_of_an_export_is_refused(tmp_path, name, says):
    """As after a fine-tuning elsewhere. GPT would leave them out without a word."""
    _, made = exported(tmp_path, "--stock=llama")
    path = f"{made}/model.safetensors"
    weights = safetensors.load_file(path)
    weights[f"model.layers.1.mlp.{name}"][3] += 0.5
    safetensors.save_file(weights, path)

    with pytest.raises(UserError, match=f"layer 1: .*{says}"):
        read_model(made)
