"""Every stage without what Windows lacks, in one process of its own.

fcntl, resource, termios and readline do not exist there, folders cannot be opened, and no C library
answers to CDLL(None). The real system is untried.
"""
import subprocess
import sys

from support import ROOT
from support.small_project import PRETRAIN, SFT, TRAIN

HIDE = """
import ctypes, importlib, os, sys
for name in ("fcntl", "resource", "termios", "readline"):
    sys.modules[name] = None
open_file, library = os.open, ctypes.CDLL
def opened(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *args, **kwargs)
def loaded(name, *args, **kwargs):
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    return library(name, *args, **kwargs)
os.open, ctypes.CDLL = opened, loaded
sys.path.insert(0, {root!r})
for program, argv in {stages!r}:
    sys.argv = [program + ".py", *argv.split()]
    importlib.import_module(program).main()
    print("finished", program)
"""


def test_every_stage(project):
    stages = [
        ("train_tokenizer", "corpus.jsonl chats.jsonl --vocab_size=300 --out_dir=tok2"),
        ("prepare_pretrain", PRETRAIN + "--val_fraction=0.1"),
        ("prepare_pretrain", PRETRAIN + "--val_fraction=0.1"),           # over the one before
        ("prepare_sft", SFT + "--val_fraction=0.2 --block_size=64 --out_dir=new_sft"),
        ("train", TRAIN + "--data_dir=new --eval_iters=1 --out_dir=run"),
        ("train", TRAIN + "--data_dir=new --out_dir=run --init_from=resume --max_iters=3"),
        ("eval", "--out_dir=run"),
        ("sample", "--out_dir=run --max_new_tokens=5"),
        ("chat", "--out_dir=run --prompt=你好 --max_new_tokens=5"),
    ]

    done = subprocess.run([sys.executable, "-c", HIDE.format(root=str(ROOT), stages=stages)],
                          cwd=project, capture_output=True, text=True, encoding="utf-8")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished") == len(stages)
    assert "could not" not in done.stdout + done.stderr
