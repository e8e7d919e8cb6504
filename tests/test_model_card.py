"""The model card of an export: its numbers, its path, and which notes it has."""
import os
import sys

import pytest

import export
from minillm import export_gguf
from minillm.model_card import NOTES, write_card
from support.exports import export_folder
from support.tiny_models import tiny_model, write_folder
from support.tiny_tokenizer import VOCAB


def card(folder, model, format="hf", notes=()):
    model.step = 1234
    write_card(folder, model, format, "out/x", "bfloat16", notes)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("n_expert, kind", [(0, "dense"), (8, "MoE")])
def test_the_numbers_are_those_of_the_model(tmp_path, n_expert, kind):
    """All parameters, not the active ones; all tokens, not the rows of the embedding."""
    model = tiny_model(n_expert, n_embd=64, n_inner=512, vocab_size=VOCAB + 20)
    total, active = model.n_params()
    assert total - active > 200_000 or not n_expert

    lines = card(tmp_path, model).splitlines()

    c = model.config
    assert f"# A {kind} language model of {total / 1e6:.1f}M parameters" in lines
    assert "Trained with mini-llm, 1,234 steps." in lines
    assert f"| layers, width, FFN | {c.n_layer}, 64, 512 |" in lines
    assert f"| query heads, key/value heads | {c.n_head}, {c.n_kv_head} |" in lines
    assert f"| context | {c.block_size} tokens |" in lines
    assert f"| vocabulary | {VOCAB} tokens |" in lines
    assert "| weights in this folder | bfloat16 |" in lines
    experts = [line for line in lines if "experts, of these" in line]
    row = f"| experts, of these per token | 8, {c.n_expert_per_tok} |"
    assert experts == ([row] if n_expert else [])


@pytest.mark.parametrize("format, library", [("hf", True), ("gguf", False)])
def test_transformers_is_named_where_it_opens_the_folder(tmp_path, format, library):
    """By the header, from which a model hub takes the code that it shows."""
    assert ("library_name: transformers\n" in card(tmp_path, tiny_model(), format)) == library


@pytest.mark.parametrize("format, package", [("hf", "safetensors"), ("gguf", "gguf")])
@pytest.mark.parametrize("doc_mask", [False, True])
def test_the_card_of_an_export_has_its_path_and_the_note_on_masks(tmp_path, format, package,
                                                                   doc_mask):
    pytest.importorskip(package)
    folder = write_folder(tmp_path / "model", tiny_model())
    (folder / "config.py").write_text(f"doc_mask = {doc_mask}\n")

    made = export_folder(folder, [f"--format={format}", "--dtype=float16"])

    with open(f"{made}/README.md", encoding="utf-8") as file:
        text = file.read()
    assert made in text and ".new" not in text
    assert "| weights in this folder | float16 |" in text
    assert (NOTES["masks"] in text) == doc_mask
    assert (NOTES["gguf"] in text) == (format == "gguf") == ("ollama create" in text)


@pytest.mark.parametrize("cap, noted", [(export_gguf.LONG_RUN, False), (20, True)])
def test_a_tokenizer_that_cuts_long_runs_is_noted_for_gguf(tmp_path, monkeypatch, cap, noted):
    """llama.cpp does not cut them. The shortest of several lengths counts."""
    pytest.importorskip("gguf")
    folder = write_folder(tmp_path / "model", tiny_model())
    inner = export_gguf.read_tokenizer

    def read_tokenizer(folder):
        patterns = {"a": r"\p{L}{1,%d}" % cap, "b": r"\s{1,%d}" % export_gguf.LONG_RUN}
        return inner(folder) | {"pre_tokenizer": patterns}
    monkeypatch.setattr(export_gguf, "read_tokenizer", read_tokenizer)

    made = export_folder(folder, ["--format=gguf"])

    with open(f"{made}/README.md", encoding="utf-8") as file:
        assert (NOTES["runs"] in file.read()) == noted


@pytest.mark.parametrize("format, package", [("hf", "safetensors"), ("gguf", "gguf")])
def test_each_format_has_its_folder_in_the_model_s(tmp_path, monkeypatch, capsys, format, package):
    """Its files are named at the end. A second export takes the place of the first."""
    pytest.importorskip(package)
    write_folder(tmp_path, tiny_model())
    monkeypatch.setattr(sys, "argv", ["export.py", f"--out_dir={tmp_path}", f"--format={format}"])

    export.main()
    export.main()

    made = sorted(os.listdir(tmp_path / format))
    assert "README.md" in made and len(made) > 2
    said = f"wrote {tmp_path}/{format}: {', '.join(made)}\n"
    assert capsys.readouterr().out == 2 * said
