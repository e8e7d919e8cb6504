"""export.py against the programs that open what it writes: Hugging Face transformers."""
import ast
import json
import os
import re
import shlex
import sys
from dataclasses import asdict

import pytest
import torch

from minillm.errors import UserError
from minillm.export_hf import read_model
from minillm.model_card import write_card
from minillm.tokenizer import END_OF_TEXT, IM_END, IM_START
from support import training_runs
from support.damage import flip
from support.exports import LONG, export_folder, lively_model
from support.tiny_models import talkative, tiny_model, write_folder

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

MODELS = {
    "dense": (LONG, []),
    "dense with biases": (LONG | {"bias": True}, []),
    "llama": (LONG, ["--stock=llama"]),
    "llama with biases": (LONG | {"bias": True}, ["--stock=llama"]),
    "MoE": (LONG | {"n_expert": 4}, []),
    "MoE, all experts": (LONG | {"n_expert": 3, "n_expert_per_tok": 3}, []),
    "more rows than tokens": (LONG | {"n_expert": 4, "vocab_size": 307}, []),
}
CHAT = [{"role": "system", "content": "你好"}, {"role": "user", "content": "一二  三\n四"},
        {"role": "assistant", "content": "The<|im_end|> cat"}, {"role": "user", "content": "天气？ "}]


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """(our model, the folder that export.py made of it)"""
    shape, argv = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model")
    model = lively_model(**shape)
    write_folder(folder, model)
    return model, export_folder(folder, argv)


def open_exported(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_gives_our_logits(exported):
    """To 1e-4 of the largest logit, over the whole context."""
    model, folder = exported
    theirs, _ = open_exported(folder)
    vocab_size = model.tokenizer.vocab_size
    idx = torch.randint(vocab_size, (3, model.config.block_size))

    with torch.no_grad():
        expected = model(idx)[..., :vocab_size]
        logits = theirs(idx).logits

    assert expected.std() > 0.5 and logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_transformers_generates_our_tokens(exported):
    """200 tokens, greedily, each with its own cache."""
    model, folder = exported
    theirs, _ = open_exported(folder)
    theirs.generation_config.eos_token_id = None
    prompt = [END_OF_TEXT, *model.tokenizer.encode("从前有座山")]

    ours = list(model.generate(prompt, 200, temperature=0))
    idx = torch.tensor([prompt])
    output = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False,
                             max_new_tokens=200)

    assert len(ours) == 200 and len(set(ours)) > 15
    assert output[0, len(prompt):].tolist() == ours


def test_a_padded_batch_generates_what_each_prompt_does_alone(exported):
    model, folder = exported
    theirs, tokenizer = open_exported(folder)
    theirs.generation_config.eos_token_id = None
    texts = ["山", "从前有座山，山上有座庙", "The cat"]

    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    output = theirs.generate(**inputs, do_sample=False, max_new_tokens=40)

    assert inputs["attention_mask"][0, 0] == 0           # padded in front
    for text, row in zip(texts, output[:, inputs["input_ids"].shape[1]:].tolist()):
        assert row == list(model.generate(model.tokenizer.encode(text), 40, temperature=0)), text


def test_chat_template_gives_our_ids_and_mask(exported):
    model, folder = exported
    _, tokenizer = open_exported(folder)

    for add_generation_prompt in (False, True):
        inputs = tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=add_generation_prompt, return_dict=True,
            return_assistant_tokens_mask=True)
        ids, mask = model.tokenizer.encode_chat(CHAT, add_generation_prompt)
        assert inputs["input_ids"] == ids and list(inputs["assistant_masks"]) == mask
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == model.config.block_size


def test_reading_back_gives_every_bit(exported):
    model, folder = exported

    start = read_model(folder)

    assert start["tokenizer_hash"] == model.tokenizer.hash
    expected = model.state_dict()
    assert start["model"].keys() == expected.keys()
    for name, weight in expected.items():
        assert start["model"][name].dtype == torch.float32, name
        assert torch.equal(start["model"][name], weight), name
    shape = asdict(model.config) | start["model_config"]
    assert shape == asdict(model.config)


def test_nothing_in_the_folder_is_code(exported):
    _, folder = exported

    endings = {os.path.splitext(name)[1] for name in os.listdir(folder)}

    assert endings == {".json", ".safetensors", ".md"}
    with open(os.path.join(folder, "config.json")) as file:
        assert "auto_map" not in json.load(file)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_compute_the_experts(tmp_path, implementation):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has one way")
    model = tiny_model(n_expert=4)
    theirs, _ = open_exported(export_folder(write_folder(tmp_path / "model", model)),
                              experts_implementation=implementation)
    idx = torch.randint(300, (2, 48))

    with torch.no_grad():
        expected, logits = model(idx), theirs(idx).logits

    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_generation_stops_where_ours_does(tmp_path):
    """A model whose seventh token is <|im_end|>: transformers ends there by its own defaults."""
    model = lively_model()
    prompt = model.tokenizer.encode("从前有座山")
    seventh = list(model.generate(prompt, 7, temperature=0))[6]
    model.wte.weight[IM_END] = model.wte.weight[seventh] * 1.001
    ours = list(model.generate(prompt, 40, temperature=0, stop_ids=(IM_END,)))
    assert len(ours) <= 7 and ours[-1] == IM_END

    theirs, _ = open_exported(export_folder(write_folder(tmp_path / "model", model)))
    output = theirs.generate(torch.tensor([prompt]), do_sample=False)

    assert output[0, len(prompt):].tolist() == ours
    assert set(theirs.generation_config.eos_token_id) == {END_OF_TEXT, IM_START, IM_END}


def test_chat_pipeline_answers_as_chat(tmp_path):
    model = talkative(tiny_model(block_size=128))
    folder = export_folder(write_folder(tmp_path / "model", model))
    pipeline = transformers.pipeline("text-generation", folder)

    output = pipeline(CHAT, do_sample=False, max_new_tokens=20)

    answer = output[0]["generated_text"][-1]
    expected = model.chat(CHAT, temperature=0, max_new_tokens=20)
    assert answer == {"role": "assistant", "content": expected} and len(expected) > 5


def test_dtype_of_the_file(tmp_path):
    model = tiny_model(n_expert=4)
    folder = export_folder(write_folder(tmp_path / "model", model), ["--dtype=bfloat16"])

    weights = safetensors.load_file(os.path.join(folder, "model.safetensors"))

    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert open_exported(folder, dtype="auto")[0].dtype == torch.bfloat16
    back = read_model(folder)["model"]
    assert {weight.dtype for weight in back.values()} == {torch.float32}
    assert torch.equal(back["wte.weight"], model.wte.weight.bfloat16().float())


def test_card_names_what_differs(tmp_path):
    dense = write_folder(tmp_path / "dense", tiny_model())
    (tmp_path / "dense" / "config.py").write_text("doc_mask = True\n")
    moe = write_folder(tmp_path / "moe", tiny_model(n_expert=4))

    cards = []
    for folder in (dense, moe):
        with open(os.path.join(export_folder(folder), "README.md"), encoding="utf-8") as file:
            cards.append(file.read())

    assert "document masks" in cards[0] and "relu²" in cards[0] and "w1 = w3" not in cards[0]
    assert "document masks" not in cards[1] and "w1 = w3" in cards[1]
    assert all("stays text" in card for card in cards)


@pytest.mark.parametrize("name", ["out/my run", "it's", 'a "b"', "模型"])
def test_commands_of_the_card_can_be_copied(tmp_path, name):
    """Whatever the folder is called, by a shell and by Python."""
    cards = {}
    for format in ("gguf", "hf"):
        write_card(tmp_path, tiny_model(), format, name, "float32", [])
        cards[format] = (tmp_path / "README.md").read_text(encoding="utf-8")

    commands = [shlex.split(line) for line in cards["gguf"].splitlines() if " my-model" in line]
    assert commands[0][4] == f"{name}/Modelfile"
    quoted = re.findall(r"from_pretrained\((.*)\)", cards["hf"])
    assert [ast.literal_eval(text) for text in quoted] == [name, name]


def test_a_second_export_takes_the_place_of_the_first(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_model())
    export_folder(folder, ["--dtype=bfloat16"])

    weights = safetensors.load_file(os.path.join(export_folder(folder), "model.safetensors"))

    assert weights["model.norm.weight"].dtype == torch.float32


def test_what_export_refuses(tmp_path, monkeypatch):
    dense = write_folder(tmp_path / "dense", tiny_model())
    moe = write_folder(tmp_path / "moe", tiny_model(n_expert=4))
    single = write_folder(tmp_path / "single", tiny_model(n_expert=4, n_expert_per_tok=1))
    (tmp_path / "full" / "exported").mkdir(parents=True)
    (tmp_path / "full" / "exported" / "thesis.txt").touch()
    write_folder(tmp_path / "full", tiny_model())
    flip(write_folder(tmp_path / "flipped", tiny_model()) / "ckpt_00000007.pt", 0.5)

    with pytest.raises(UserError, match="--stock=llama is for dense models"):
        export_folder(moe, ["--stock=llama"])
    with pytest.raises(UserError, match="n_expert_per_tok=1 can't be exported"):
        export_folder(single)
    with pytest.raises(UserError, match="no model in .*nowhere"):
        export_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds other things .thesis.txt.*--export_dir"):
        export_folder(tmp_path / "full")
    with pytest.raises(UserError, match="ckpt_00000007.pt is damaged: the checksum"):
        export_folder(tmp_path / "flipped")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        export_folder(dense)
    assert not os.path.exists(os.path.join(dense, "exported"))


@pytest.mark.parametrize("shape", [[], training_runs.MOE], ids=["dense", "MoE"])
def test_train_starts_from_an_exported_folder(tmp_path, shape):
    """init_from=hf:FOLDER gives the run that init_from=DIR gives, to the last bit."""
    short = [*training_runs.TINY, "--max_iters=10", "--eval_interval=5"]
    data = training_runs.make_data(tmp_path / "data")
    argv = [*short, f"--data_dir={data}"]
    training_runs.finish([*argv, *shape, "--vocab_size=304", f"--out_dir={tmp_path}/base"])
    folder = export_folder(str(tmp_path / "base"))

    for out, start in (("a", tmp_path / "base"), ("b", f"hf:{folder}")):
        training_runs.finish([*argv, f"--out_dir={tmp_path}/{out}", f"--init_from={start}"])
    line = training_runs.refused([*argv, f"--out_dir={tmp_path}/c", "--init_from=hf:nowhere"])

    training_runs.assert_same_run(tmp_path / "a", tmp_path / "b")
    assert "no model of export.py in nowhere" in line


def change_config(folder, **changes):
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    config = {key: value for key, value in (config | changes).items() if value != "gone"}
    with open(path, "w") as file:
        json.dump(config, file)


def change_weight(folder, name, change):
    path = os.path.join(folder, "model.safetensors")
    weights = safetensors.load_file(path)
    weights[name] = change(weights[name])
    safetensors.save_file(weights, path)


FFN = "model.layers.1.mlp."
EXPERT = "model.layers.1.block_sparse_moe.experts.2."
NOT_OURS = [
    ("arcee", "hidden_act is 'relu2'", lambda folder: change_config(folder, hidden_act="relu2")),
    ("arcee", "model_type 'gpt2'", lambda folder: change_config(folder, model_type="gpt2")),
    ("arcee", "rms_norm_eps", lambda folder: change_config(folder, rms_norm_eps=1e-5)),
    ("arcee", "tie_word_embeddings",
     lambda folder: change_config(folder, tie_word_embeddings=False)),
    ("arcee", "rope_type is 'yarn'",
     lambda folder: change_config(folder, rope_parameters={"rope_type": "yarn"})),
    ("arcee", "differ", lambda folder: change_config(folder, mlp_bias=True)),
    ("arcee", "lacks 'hidden_size'", lambda folder: change_config(folder, hidden_size="gone")),
    ("arcee", "damaged", lambda folder: change_config(folder, rope_parameters=5)),
    ("arcee", "no model of export.py", lambda folder: os.remove(f"{folder}/config.json")),
    ("arcee", "no model of export.py", lambda folder: os.remove(f"{folder}/model.safetensors")),
    ("arcee", "damaged", lambda folder: os.truncate(f"{folder}/config.json", 100)),
    ("arcee", "damaged", lambda folder: os.truncate(f"{folder}/model.safetensors", 5000)),
    ("arcee", "tokenizer.json", lambda folder: os.remove(f"{folder}/tokenizer.json")),
    ("llama", "the FFN has a gate",
     lambda folder: change_weight(folder, FFN + "up_proj.weight", lambda weight: weight + 1)),
    ("llama", "the FFN has biases",
     lambda folder: change_weight(folder, FFN + "down_proj.bias", lambda bias: bias + 1)),
    ("mixtral", "they have a gate",
     lambda folder: change_weight(folder, EXPERT + "w3.weight", lambda weight: weight + 1)),
    ("mixtral", "sliding window", lambda folder: change_config(folder, sliding_window=32)),
]


@pytest.mark.parametrize("kind, says, spoil", NOT_OURS)
def test_a_folder_that_is_not_ours_is_refused(tmp_path, kind, says, spoil):
    """One line that names the folder; never a model that computes something else."""
    model = tiny_model(n_expert=4 if kind == "mixtral" else 0)
    argv = ["--stock=llama"] if kind == "llama" else []
    folder = export_folder(write_folder(tmp_path / "model", model), argv)
    read_model(folder)

    spoil(folder)

    with pytest.raises(UserError, match=says) as error:
        read_model(folder)
    assert folder in str(error.value) and "\n" not in str(error.value)
