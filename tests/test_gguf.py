"""export.py --format=gguf against a stock llama.cpp: log-probabilities, long text, tokens, chat."""
import json
import os
import random
import sys

import pytest
import torch
from tokenizers import pre_tokenizers, trainers

from minillm import export_gguf, tokenizer
from minillm.errors import UserError
from support import ROOT
from support.exports import LONG, export_folder, lively_model
from support.llama_cpp import LlamaCpp
from support.preparation_runs import finish
from support.tiny_models import tiny_model, write_folder

gguf = pytest.importorskip("gguf")

MODELS = {
    "dense": LONG,
    "dense with biases": LONG | {"bias": True},
    "MoE": LONG | {"n_expert": 4},
    "MoE, all experts": LONG | {"n_expert": 3, "n_expert_per_tok": 3},
    "more rows than tokens": LONG | {"n_expert": 4, "vocab_size": 307},
}
GGUF = ["--format=gguf"]
TEXTS = ["从前有座山，山上有座庙", "The cat sat on", "一二三 45\n\n", "😀 emoji 🚀", "你好"]


@pytest.fixture(scope="module", params=MODELS)
def served(request, tmp_path_factory):
    """(our model, a llama.cpp that has opened its GGUF)"""
    folder = tmp_path_factory.mktemp("model")
    model = lively_model(**MODELS[request.param])
    model.wte.weight[:3] = 0                     # no special token is the likeliest: no text ends
    write_folder(folder, model)
    with LlamaCpp(os.path.join(export_folder(folder, GGUF), "model.gguf")) as server:
        yield model, server


@torch.no_grad()
def our_log_probabilities(model, ids):
    logits = model(torch.tensor([ids]))[0, -1, :model.tokenizer.vocab_size]
    return logits.log_softmax(-1).tolist()


def test_llama_cpp_gives_our_log_probabilities(served):
    """Of every token of the vocabulary, after each of several prompts."""
    model, server = served
    vocab_size = model.tokenizer.vocab_size

    for text in TEXTS:
        ids = model.tokenizer.encode(text)
        expected = our_log_probabilities(model, ids)
        theirs = server.log_probabilities(ids, vocab_size)
        assert sorted(theirs) == list(range(vocab_size))
        error = max(abs(theirs[id] - value) for id, value in enumerate(expected))
        assert error < 1e-4 * max(map(abs, expected)), text


def test_llama_cpp_generates_our_tokens(served):
    model, server = served
    prompt = model.tokenizer.encode("从前有座山")

    ours = list(model.generate(prompt, 200, temperature=0))

    assert len(set(ours)) > 15
    assert server.greedy(prompt, 200) == ours


@pytest.mark.parametrize("dtype, bound", [("f16", 0.05), ("bf16", 0.3), ("q8_0", 1)])
def test_smaller_types_stay_close(tmp_path, dtype, bound):
    """Log-probabilities are off by less than `bound`; with relu² it would be several."""
    model = lively_model(n_embd=64, n_inner=96, n_expert=4)
    folder = export_folder(write_folder(tmp_path / "model", model), [*GGUF, f"--dtype={dtype}"])
    ids = model.tokenizer.encode("从前有座山，山上有座庙")

    with LlamaCpp(os.path.join(folder, "model.gguf")) as server:
        theirs = server.log_probabilities(ids, model.tokenizer.vocab_size)

    expected = our_log_probabilities(model, ids)
    errors = [abs(theirs[id] - value) for id, value in enumerate(expected)]
    assert 1e-5 < max(errors) < bound


def mixed_text():
    """(what the tokenizer learns from, what it is tried on): Chinese, code, emoji, indents."""
    names = ["README_ZH.md", "README.md", "train.py", "minillm/tokenizer.py", "demo/town.py"]
    texts = []
    for name in names:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            texts.append(file.read())
    odd = [
        "😀👍🏽 emoji👩‍💻🚀🚀🚀", "\t\tif x:\n\t\t\treturn  y  # 返回\n\n\n    pass", "——……",
        "ＡＢＣ　全角", "naïve café Привет مرحبا हिन्दी", "a=b+c*(d-e)/f;",
        "中文English混排123没有空格", " " * 12 + "x" + " " * 7 + "\n" + "=" * 14, "'s don't WE'LL",
        "\u200b零宽\ufeff", "《》「」", "a\u00a0b\u3000c\r\nd\x00e", "价格￥3.50，涨了12%！",
    ]
    return texts, texts + odd


def test_llama_cpp_gives_our_tokens(tmp_path):
    """On mixed text, line by line and whole; the tokenizer has merges of several kinds of text."""
    learned, tried = mixed_text()
    backend = tokenizer.untrained()
    backend.train_from_iterator(learned, trainers.BpeTrainer(
        vocab_size=3000, special_tokens=tokenizer.SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = tiny_model(vocab_size=3000)
    write_folder(tmp_path / "model", model)
    tokenizer.save(backend, tmp_path / "model" / "tokenizer")
    ours = tokenizer.Tokenizer.load(tmp_path / "model" / "tokenizer")
    tokenizer_json = export_gguf.read_tokenizer(tmp_path / "model" / "tokenizer")
    export_gguf.write_model(tmp_path, model.config, model.state_dict(), tokenizer_json, "q8_0", "x")
    assert export_gguf.shortest_cap(tokenizer_json) == export_gguf.LONG_RUN

    with LlamaCpp(tmp_path / "model.gguf") as server:
        for text in tried:
            for piece in (text, *text.split("\n")[::10]):
                assert server.tokenize(piece) == ours.encode(piece), piece[:80]


ADDED = ["<think>", "</think>", "【工具】", "café!"]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """(a GGUF, its tokenizer with ADDED and, last, a control token that somebody added)"""
    folder = tmp_path_factory.mktemp("thinking")
    (folder / "c.txt").write_text("想一想<think>先数三</think>七。【工具】查\n" * 20, "utf-8")
    finish("train_tokenizer", folder / "c.txt", f"--special_tokens={','.join(ADDED)}",
           "--vocab_size=310", f"--out_dir={folder}/t")
    tokenizer_json = export_gguf.read_tokenizer(folder / "t")
    control = tokenizer_json["added_tokens"][-1] | {"content": "<控制>", "special": True}
    control["id"] = tokenizer.Tokenizer.load(folder / "t").vocab_size
    tokenizer_json["added_tokens"].append(control)
    (folder / "t/tokenizer.json").write_text(json.dumps(tokenizer_json), "utf-8")
    model = tiny_model(vocab_size=control["id"] + 1)
    export_gguf.write_model(folder, model.config, model.state_dict(), tokenizer_json, "q8_0", "x")
    return folder / "model.gguf", tokenizer.Tokenizer.load(folder / "t")


def test_added_tokens_have_the_type_that_our_tokenizer_gives_them(thinking):
    """Those of --special_tokens are found in any text, control tokens in none."""
    path, _ = thinking

    types = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()

    kind = gguf.TokenType
    assert types[:7] == [kind.CONTROL] * 3 + [kind.USER_DEFINED] * 4
    assert set(types[7:-1]) == {kind.NORMAL} and types[-1] == kind.CONTROL


def test_llama_cpp_reads_and_writes_added_tokens_as_we_do(thinking):
    path, ours = thinking
    rng = random.Random(0)
    pieces = [*ADDED, "<控制>", "<|im_end|>", "<", "think>", "【", "工具", "caf", "é", "a b", "\n",
              "😀"]

    with LlamaCpp(path) as server:
        for _ in range(300):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
            assert server.tokenize(text) == ours.encode(text), text
        for token in range(3, 7):
            said = server.post("/detokenize", {"tokens": [token]})["content"]
            assert said == ADDED[token - 3] == ours.decode([token])


def test_chat_in_llama_cpp(tmp_path):
    """Its own chat endpoint renders our template: the same tokens, the same answer."""
    model = lively_model(block_size=128)
    folder = export_folder(write_folder(tmp_path / "model", model), GGUF)
    chat = [{"role": "system", "content": "你好"}, {"role": "user", "content": "天气？ "}]
    ids, _ = model.tokenizer.encode_chat(chat, add_generation_prompt=True)

    with LlamaCpp(os.path.join(folder, "model.gguf")) as server:
        prompt = server.post("/apply-template", {"messages": chat})["prompt"]
        tokens = server.post("/tokenize", {"content": prompt, "parse_special": True})["tokens"]

    assert tokens == ids
    with open(os.path.join(folder, "Modelfile"), encoding="utf-8") as file:
        modelfile = file.read()
    assert "{{ .Content }}<|im_end|>\n" in modelfile and "num_ctx 128" in modelfile


def test_what_gguf_refuses(tmp_path, monkeypatch):
    model = write_folder(tmp_path / "model", tiny_model())
    single = write_folder(tmp_path / "single", tiny_model(n_expert=4, n_expert_per_tok=1))
    folds = write_folder(tmp_path / "folds", tiny_model())
    monkeypatch.setattr(export_gguf.json, "load", lambda file: {"normalizer": {"type": "NFKC"}})

    with pytest.raises(UserError, match="q8_0 is for --format=gguf"):
        export_folder(model, ["--dtype=q8_0"])
    with pytest.raises(UserError, match="--stock is for --format=hf"):
        export_folder(model, [*GGUF, "--stock=llama"])
    with pytest.raises(UserError, match="n_expert_per_tok=1 can't be exported"):
        export_folder(single, GGUF)
    with pytest.raises(UserError, match="nfkc=True"):
        export_folder(folds, GGUF)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        export_folder(model, GGUF)
