"""A chat with a model that has had no SFT: one line says why the answers make no sense."""
import shutil

import pytest

from minillm.before_sft import warn_before_sft
from support.processes import run
from support.small_project import CHECKPOINT

ASK = ["--prompt=a", "--max_new_tokens=2", "--device=cpu"]


@pytest.mark.parametrize("model", ["out", CHECKPOINT])
def test_a_model_that_was_trained_on_text(project, model):
    done = run("chat", [f"--out_dir={model}", *ASK], folder=project)

    assert done.status == 0
    assert done.err.startswith(f"{model} was trained on text, not on chats")
    assert done.err.endswith(f"train.py config/sft.py --init_from={model}\n")


def test_silent_where_nothing_is_known(project, monkeypatch, capsys):
    """After SFT, where the data has moved, where config.py is gone, and for an exported model."""
    monkeypatch.chdir(project)
    config = (project / "out/config.py").read_text().replace("'pre'", "'sft'")
    shutil.copytree("out", "after_sft")
    (project / "after_sft/config.py").write_text(config)
    shutil.copytree("out", "without_config")
    (project / "without_config/config.py").unlink()

    for model in ("after_sft", "without_config", "hf:out/hf", "nowhere"):
        warn_before_sft(model)
    shutil.rmtree("pre")
    warn_before_sft("out")

    assert capsys.readouterr().err == ""
