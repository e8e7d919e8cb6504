"""A model is ready soon: what is not imported for it, weights that are not copied or drawn.

Each import that is not needed would cost between 0.2 and 2 s.
"""
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from minillm import checkpoint
from model import GPT
from support import ROOT
from support.processes import LIMIT
from support.tiny_models import talkative, tiny_model, write_folder

OF_OTHERS = ["transformers", "torch._dynamo", "torch._inductor", "sympy", "matplotlib", "pandas"]
OF_OURS = ["train", "minillm.dataloader", "minillm.http_app", "bench"]

ANSWER = """
import sys, runpy
sys.argv = ["chat.py", "--out_dir=tiny", "--prompt=你", "--max_new_tokens=2", "--device=cpu"]
runpy.run_path(sys.path[0] + "/chat.py", run_name="__main__")
print(*sys.modules, file=sys.stderr)
"""
WRONG_FOLDER = """
import sys
sys.argv = ["chat.py", "--out_dir=nowhere", "--prompt=x"]
import chat
from minillm.errors import UserError
try:
    chat.main()
except UserError as error:
    print(error)
print("torch" in sys.modules)
"""


def run_program(program, folder):
    """The finished process of a Python program that finds the repository first."""
    program = f"import sys; sys.path.insert(0, {ROOT!r})\n" + program
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True,
                          text=True, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_chat_imports_nothing_that_it_does_not_need(tmp_path):
    write_folder(tmp_path / "tiny", talkative(tiny_model()))

    done = run_program(ANSWER, tmp_path)

    assert done.returncode == 0 and len(done.stdout) > 1
    modules = done.stderr.split()
    assert {"torch", "tokenizers", "minillm.generation"} <= set(modules)
    assert [name for name in OF_OTHERS + OF_OURS if name in modules] == []


@pytest.mark.parametrize("name", OF_OURS)
def test_what_chat_does_not_need_exists(name):
    """A module that was renamed is never imported, and would be looked for in vain."""
    assert importlib.util.find_spec(name)


def test_wrong_settings_are_said_before_torch_is_imported(tmp_path):
    done = run_program(WRONG_FOLDER, tmp_path)

    assert "no model in nowhere" in done.stdout
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr


def mapped_ranges(file_name):
    """[(first, last)]: the addresses of this process where a file is mapped (Linux)."""
    ranges = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if file_name in line:
                first, last = line.split()[0].split("-")
                ranges.append((int(first, 16), int(last, 16)))
    return ranges


def test_weights_are_not_copied(tmp_path):
    """float32 on the CPU: the parameters are the mapped file, and none was initialised."""
    model = tiny_model()
    write_folder(tmp_path / "tiny", model)
    state = torch.get_rng_state()

    loaded = GPT.from_checkpoint(tmp_path / "tiny", device="cpu", dtype="float32")

    assert torch.equal(torch.get_rng_state(), state)
    ranges = mapped_ranges("ckpt_00000007.pt")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
        assert any(first <= parameter.data_ptr() < last for first, last in ranges)
    assert loaded.step == 7 and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_norms_router_and_rope_stay_in_float32(tmp_path):
    write_folder(tmp_path / "tiny", tiny_model(n_expert=4))

    loaded = GPT.from_checkpoint(tmp_path / "tiny", device="cpu", dtype="bfloat16")

    for name, parameter in loaded.named_parameters():
        wide = "norm" in name or "router" in name
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert loaded.rope.dtype == torch.float32
    hello = [{"role": "user", "content": "你好"}]
    assert loaded.chat(hello, max_new_tokens=5, seed=1) is not None


@pytest.mark.parametrize("kind", [{}, {"n_expert": 4}], ids=["dense", "MoE"])
def test_weights_that_training_goes_on_from_are_not_drawn_first(tmp_path, kind):
    """Drawing takes 1 s for the dense model and 9 s for the MoE."""
    model = tiny_model(**kind)
    start = checkpoint.load_for_inference(write_folder(tmp_path / "m", model), "newest")
    data = SimpleNamespace(folder="data", meta={
        "tokenizer_hash": start["tokenizer_hash"], "vocab_size": model.config.vocab_size})
    settings = train.Settings(block_size=model.config.block_size)
    settings.given = set()
    state = torch.get_rng_state()

    loaded = train.build_model(settings, data, start)

    assert torch.equal(torch.get_rng_state(), state)
    for name, weights in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights)
    assert torch.equal(loaded.rope, model.rope)
