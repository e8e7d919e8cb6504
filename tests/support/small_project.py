"""A small project, made by the programs themselves, and what a user types to work in it.

    corpus.jsonl  chats.jsonl  tok/       pre/  sft/   out/
    text          chats        tokenizer  token files  a trained model
"""
import shutil

import pytest

from support.preparation_runs import write_chats, write_texts
from support.processes import finish

TRAIN = ("--data_dir=pre --out_dir=new --block_size=64 --n_layer=1 --n_head=2 "
         "--n_kv_head=1 --n_embd=16 --batch_size=2 --max_iters=2 --device=cpu ")
TRAIN_SFT = TRAIN.replace("pre", "sft")
PRETRAIN = "corpus.jsonl --tokenizer=tok --out_dir=new "
SFT = "chats.jsonl --tokenizer=tok --out_dir=new "
CHECKPOINT = "out/ckpt_00000002.pt"
LONG = "很" * 500                                # more tokens than the context holds


@pytest.fixture(scope="session")
def small_project(tmp_path_factory):
    """The folder that every `project` is a copy of."""
    folder = tmp_path_factory.mktemp("small") / "project"
    folder.mkdir()
    write_texts(folder / "corpus.jsonl", [
        f"第{i}篇：天气很好，我们去公园散步。" * 4
        for i in range(80)
    ])
    write_chats(folder / "chats.jsonl", [
        [{"role": "user", "content": f"{i} 加 {i} 是多少？"},
         {"role": "assistant", "content": f"是{2 * i}。"}]
        for i in range(40)
    ])
    for program, argv in [
        ("train_tokenizer", "corpus.jsonl chats.jsonl --vocab_size=300 --out_dir=tok"),
        ("prepare_pretrain", PRETRAIN + "--val_fraction=0.1 --out_dir=pre"),
        ("prepare_sft", SFT + "--val_fraction=0.2 --block_size=64 --out_dir=sft"),
        ("train", TRAIN + "--eval_iters=1 --out_dir=out"),
    ]:
        finish(program, argv.split(), folder=folder)
    return folder


@pytest.fixture
def project(small_project, tmp_path):
    """A fresh copy of the small project."""
    return shutil.copytree(small_project, tmp_path / "project")
