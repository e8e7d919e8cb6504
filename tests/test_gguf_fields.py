"""What a GGUF says of its model, read with the package gguf alone; test_gguf.py asks llama.cpp."""
import re

import pytest
import torch

from minillm import export_gguf
from minillm.export_gguf import CHAT_TEMPLATE
from minillm.sampling_params import DEFAULTS
from minillm.tokenizer import END_OF_TEXT, IM_END
from support.exports import export_folder
from support.tiny_models import tiny_model, write_folder
from support.tiny_tokenizer import VOCAB

gguf = pytest.importorskip("gguf")
SHAPE = dict(n_embd=64, n_inner=96, n_head=4, n_kv_head=2, rope_theta=5e5)


def exported(folder, dtype="float32", **shape):
    """(the model, its folder, what a reader finds in the file)"""
    model = tiny_model(**SHAPE | shape)
    argv = ["--format=gguf", f"--dtype={dtype}"]
    made = export_folder(write_folder(folder / "town", model), argv)
    return model, made, gguf.GGUFReader(f"{made}/model.gguf")


@pytest.mark.parametrize("shape, experts", [
    ({}, (1, 1)), ({"n_expert": 4, "n_expert_per_tok": 3}, (4, 3)), ({"bias": True}, None)],
    ids=["dense", "MoE", "with biases"])
def test_the_sizes_are_those_of_the_model(tmp_path, shape, experts):
    """Without biases a dense model is one expert that every token visits."""
    model, _, reader = exported(tmp_path, **shape)

    def field(name):
        return reader.fields[f"llama.{name}"].contents()
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.name"].contents() == "town"
    assert field("context_length") == model.config.block_size
    assert field("block_count") == model.config.n_layer
    assert (field("embedding_length"), field("feed_forward_length")) == (64, 96)
    assert (field("attention.head_count"), field("attention.head_count_kv")) == (4, 2)
    assert field("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert (field("rope.dimension_count"), field("rope.freq_base")) == (16, 5e5)
    if experts:
        assert (field("expert_count"), field("expert_used_count")) == experts
    assert ("llama.expert_count" in reader.fields) == bool(experts)


def test_the_tokenizer_adds_nothing_and_ends_where_ours_does(tmp_path):
    _, _, reader = exported(tmp_path, vocab_size=VOCAB + 20)

    def field(name):
        return reader.fields[f"tokenizer.{name}"].contents()
    assert (field("ggml.model"), field("ggml.pre")) == ("gpt2", "qwen2")
    assert len(field("ggml.tokens")) == reader.fields["llama.vocab_size"].contents() == VOCAB
    ends = [field(f"ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")]
    assert ends == [END_OF_TEXT, IM_END, IM_END, END_OF_TEXT]
    assert not field("ggml.add_bos_token") and not field("ggml.add_space_prefix")
    assert field("chat_template") == CHAT_TEMPLATE


def test_a_folder_s_name_need_not_be_utf_8(tmp_path):
    """Python has a half of a surrogate pair for each byte that is none."""
    model = tiny_model(**SHAPE)
    write_folder(tmp_path, model)
    tokenizer_json = export_gguf.read_tokenizer(tmp_path / "tokenizer")

    export_gguf.write_model(tmp_path, model.config, model.state_dict(), tokenizer_json, "float32",
                            "town\udcff")

    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.name"].contents() == "town\\udcff"


@pytest.mark.parametrize("dtype, matrices", [
    ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"), ("q8_0", "Q8_0")])
def test_matrices_have_the_type_that_is_asked_for_and_the_rest_float32(tmp_path, dtype, matrices):
    """Rows of q8_0 are multiples of 32 numbers: others are float16."""
    _, _, reader = exported(tmp_path, dtype, n_expert=4, n_inner=104)

    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}

    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_up_exps.weight"] == matrices
    assert kinds["output_norm.weight"] == kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    down = kinds["blk.1.ffn_down_exps.weight"]
    assert down == ("F16" if dtype == "q8_0" else matrices)
    said = gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name
    assert said.removeprefix("ALL_").removeprefix("MOSTLY_") == matrices


def test_pairs_that_rope_turns_are_neighbours(tmp_path):
    """Ours are channels i and i + 8 of a head's 16. Rows without a token are left out."""
    model, _, reader = exported(tmp_path, vocab_size=VOCAB + 20)
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    order = torch.arange(16).view(2, 8).t().flatten()    # 0, 8, 1, 9, ...

    q, k, v = model.blocks[1].attn.qkv.weight.split((64, 32, 32))
    assert torch.equal(found["blk.1.attn_q.weight"], q.view(4, 16, 64)[:, order].flatten(0, 1))
    assert torch.equal(found["blk.1.attn_k.weight"], k.view(2, 16, 64)[:, order].flatten(0, 1))
    assert torch.equal(found["blk.1.attn_v.weight"], v)
    assert torch.equal(found["token_embd.weight"], model.wte.weight[:VOCAB])


def test_the_constant_gate_of_a_model_with_biases_is_1(tmp_path):
    """llama computes silu(gate) * up, and we silu(gate)."""
    model, _, reader = exported(tmp_path, bias=True)
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}

    ffn = model.blocks[1].ffn
    assert not found["blk.1.ffn_up.weight"].any() and found["blk.1.ffn_up.bias"].eq(1).all()
    assert torch.equal(found["blk.1.ffn_gate.weight"], ffn.up.weight)
    assert torch.equal(found["blk.1.ffn_down.weight"], ffn.down.weight)


def test_ollama_answers_as_chat_does_without_flags(tmp_path):
    model, made, _ = exported(tmp_path)

    with open(f"{made}/Modelfile", encoding="utf-8") as file:
        lines = file.read().splitlines()

    assert [line.removeprefix("PARAMETER ") for line in lines if line.startswith("PARAM")] == [
        'stop "<|im_end|>"', f"num_ctx {model.config.block_size}",
        f"temperature {DEFAULTS.temperature}", f"top_k {DEFAULTS.top_k}", f"top_p {DEFAULTS.top_p}",
        "min_p 0.0", f"repeat_penalty {DEFAULTS.repetition_penalty}"]


def test_ollama_writes_a_chat_as_the_template_in_the_file_does(tmp_path):
    """In its own template language, of which this reads a loop over the messages."""
    jinja2 = pytest.importorskip("jinja2")
    _, made, _ = exported(tmp_path)
    with open(f"{made}/Modelfile", encoding="utf-8") as file:
        template = file.read().split('"""')[1]
    chat = [{"role": "system", "content": "短"}, {"role": "user", "content": "你好\n"}]

    loop, prompt = re.fullmatch(r"{{- range .Messages }}(.*){{ end }}(.*)", template, re.S).groups()
    written = [loop.replace("{{ .Role }}", message["role"])
               .replace("{{ .Content }}", message["content"]) for message in chat]

    render = jinja2.Template(CHAT_TEMPLATE).render
    assert "".join(written) + prompt == render(messages=chat, add_generation_prompt=True)
    assert "".join(written) == render(messages=chat, add_generation_prompt=False)
