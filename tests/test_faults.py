"""Bad input to any program: odd values for every flag, no memory, odd file names.

test_faults_<program>.py holds the cases that one program must name.
"""
import dataclasses
import importlib.util
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from minillm import errors
from support.bad_input import tree
from support.preparation_runs import meta
from support.processes import finish, run
from support.small_project import PRETRAIN, SFT, TRAIN

ODD = ["nan", "inf", "-inf", "-1", "0", "1e30", "-1e30", "1e9", "2", "", "../no/such", "0.5",
       "True", "None", "a" * 300, "\udcff", "cuda:5", ":"]
PLAIN = {
    "train_tokenizer": "corpus.jsonl --vocab_size=300 --out_dir=new",
    "prepare_pretrain": PRETRAIN + "--val_fraction=0.1",
    "prepare_sft": SFT + "--block_size=64 --val_fraction=0.2",
    "train": TRAIN + "--eval_iters=1",
    "eval": "--out_dir=out",
    "sample": "--out_dir=out --max_new_tokens=5",
    "chat": "--out_dir=out --prompt=你好 --max_new_tokens=5",
    "export": "--out_dir=out",
}
LONG_RUNS = [("train", "max_iters", "1e9"), ("train", "compile", "True")]


@pytest.mark.slow
@pytest.mark.parametrize("program", PLAIN)
def test_every_flag_with_odd_values(small_project, tmp_path, program, capsys):
    """It works, or it is refused in one line and leaves nothing behind."""
    tried, refused = 0, 0
    folder = tmp_path / "project"
    as_before = tree(small_project)
    settings = dataclasses.fields(importlib.import_module(program).Settings)
    flags = [field.name for field in settings if field.default_factory is not list]
    for flag in flags:
        for value in ODD:
            if (program, flag, value) in LONG_RUNS:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(small_project, folder)

            done = run(program, [*PLAIN[program].split(), f"--{flag}={value}"], folder=folder)

            what = f"{program}.py --{flag}={value}\n{done.output}"
            assert done.status in (0, 2) and "Traceback" not in what, what
            tried += 1
            if done.status == 2:
                refused += 1
                assert len(done.err.strip().splitlines()) == 1, what
                assert done.err.startswith(f"{program}.py: "), what
                assert tree(folder) == as_before, what
    with capsys.disabled():
        print(f"\n{program}: {tried} odd values, {refused} of them refused with one line")
    assert refused > tried / 3


def no_room_on_the_gpu():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139 GiB. "
        "If reserved memory is large try ...")


@pytest.mark.parametrize("ask", [
    pytest.param(lambda: np.empty(10**17), id="numpy"),
    pytest.param(lambda: torch.empty(10**17), id="torch"),
    pytest.param(no_room_on_the_gpu, id="GPU"),
])
def test_memory_that_cannot_be_had(monkeypatch, capsys, ask):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    with pytest.raises(SystemExit) as leave:
        errors.run(ask)

    assert leave.value.code == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"train.py: out of memory \(.*allocate.*\): a smaller batch_size.*\n", line)


def test_another_runtime_error_keeps_its_traceback():
    with pytest.raises(RuntimeError):
        errors.run(lambda: torch.ones(2) @ torch.ones(3))


def test_a_file_name_that_is_not_utf8(project):
    """Names in GBK, as archives from Windows hold: every stage reads, writes and keeps them."""
    name, out = (os.fsdecode(word.encode("gbk")) for word in ("语料.jsonl", "输出"))
    os.rename(project / "corpus.jsonl", project / name)
    exports = []
    if importlib.util.find_spec("safetensors") and importlib.util.find_spec("gguf"):
        exports = [("export", f"--out_dir=model_{out} --format={kind}") for kind in ("hf", "gguf")]

    for program, argv in [
        ("train_tokenizer", f"{name} --vocab_size=300 --out_dir=tok_{out}"),
        ("prepare_pretrain", f"{name} --tokenizer=tok_{out} --val_fraction=0.1 --out_dir={out}"),
        ("train", TRAIN + f"--data_dir={out} --out_dir=model_{out} --eval_iters=1"),
        ("eval", f"--out_dir=model_{out}"),
        *exports,
    ]:
        finish(program, argv.split(), folder=project)

    assert meta(project / out)["sources"] == [name]
