"""How quickly a model is ready to talk.

What is imported for it, and that its weights are neither initialised nor copied.
"""
import os
import subprocess
import sys

import torch

from support import ROOT
from support.processes import LIMIT
from model import GPT
from support.tiny_models import talkative, tiny_model, write_folder

# Each costs between 0.2 and 2 s. What is measured: an answer of one token, through the whole of
# chat.py.
NOT_NEEDED = ("transformers", "torch._dynamo", "torch._inductor", "sympy", "matplotlib", "pandas", "train", "data", "bench")


def test_chat_imports_nothing_that_it_does_not_need(tmp_path):
    write_folder(tmp_path / "tiny", talkative(tiny_model()))
    program = ("import sys, runpy; sys.argv = ['chat.py', '--out_dir=tiny', '--prompt=你', '--max_new_tokens=2', '--device=cpu']; "
               f"sys.path.insert(0, {ROOT!r}); runpy.run_path({os.path.join(ROOT, 'chat.py')!r}, run_name='__main__'); "
               "print(' '.join(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and len(done.stdout) > 1
    modules = done.stderr.split()
    assert "torch" in modules and "tokenizers" in modules
    assert [name for name in NOT_NEEDED if name in modules] == []


def test_wrong_settings_are_said_before_torch_is_imported():
    program = (f"import sys; sys.path.insert(0, {ROOT!r}); sys.argv = ['chat.py', '--out_dir=nowhere', '--prompt=x']; import chat\n"
               "from minillm.errors import UserError\n"
               "try: chat.main()\nexcept UserError as error: print(error)\nprint('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    assert "no model in nowhere" in done.stdout and done.stdout.endswith("False\n"), done.stdout + done.stderr


def test_weights_are_not_copied(tmp_path):
    """float32 on the CPU.

    The parameters are the mapped file itself, and no random number was drawn for them.
    """
    model = tiny_model()
    write_folder(tmp_path / "tiny", model)
    state = torch.get_rng_state()
    loaded = GPT.from_checkpoint(tmp_path / "tiny", device="cpu", dtype="float32")
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    with open("/proc/self/maps") as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if "ckpt_00000007.pt" in line]
    for parameter in loaded.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges)
    assert loaded.step == 7 and not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_dtypes(tmp_path):
    write_folder(tmp_path / "tiny", tiny_model(n_expert=4))
    loaded = GPT.from_checkpoint(tmp_path / "tiny", device="cpu", dtype="bfloat16")
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name or "router" in name else torch.bfloat16), name
    assert loaded.rope.dtype == torch.float32
    assert loaded.chat([{"role": "user", "content": "你好"}], max_new_tokens=5, seed=1) is not None
