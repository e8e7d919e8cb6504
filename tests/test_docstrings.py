"""The examples in the docstrings of the model and of conversations run."""
import inspect

import pytest
import torch

import model as model_module
from minillm import conversation as conversation_module
from minillm.conversation import Conversation
from model import GPT, GPTConfig
from support.tiny_models import tiny_model, write_folder


def example(thing):
    """The indented code of a docstring."""
    lines = inspect.getdoc(thing).split("\n")
    code = [line[4:] for line in lines if line.startswith("    ")]
    assert code
    return "\n".join(code)


@pytest.fixture(autouse=True)
def demo_model(tmp_path, monkeypatch):
    """out/demo_sft holds a model, as after `make demo`."""
    write_folder(tmp_path / "out/demo_sft", tiny_model(block_size=128))
    monkeypatch.chdir(tmp_path)


def test_example_of_the_model():
    idx = torch.randint(0, 300, (2, 9))

    def small_config(n_layer):
        return GPTConfig(n_layer=n_layer, n_embd=32, n_head=4, n_kv_head=2, vocab_size=300)
    names = {"GPT": GPT, "GPTConfig": small_config, "idx": idx, "targets": idx}

    exec(example(model_module), names)

    assert names["loss_sum"].ndim == 0 and len(names["model"].blocks) == 2


def test_examples_of_its_methods_and_of_a_conversation(capsys):
    names = {"GPT": GPT, "Conversation": Conversation}
    for method in (GPT.from_checkpoint, GPT.generate, GPT.chat):
        exec(example(method), names)
    assert isinstance(names["text"], str) and names["text"] and names["answer"]

    exec(example(conversation_module), names)

    assert names["conversation"].messages()[-1]["content"] == capsys.readouterr().out != ""
