"""A small corpus to prepare: two files of text, one of conversations, and a tokenizer.

    a.jsonl  b.jsonl     chats.jsonl        tokenizer/
    texts(200)           chats(120)
"""
import pathlib
from typing import NamedTuple

import pytest

from minillm.tokenizer import Tokenizer
from support.preparation_runs import chats, finish, meta, texts, write_chats, write_texts
from support.tiny_tokenizer import make_tokenizer


class Corpus(NamedTuple):
    folder: pathlib.Path
    tokenizer: Tokenizer

    def argv(self, out, files, *flags):
        paths = [self.folder / name for name in files]       # an absolute one stays what it is
        return [*paths, f"--tokenizer={self.folder}/tokenizer", f"--out_dir={out}", *flags]

    def pretrain(self, out, *flags, files=("a.jsonl", "b.jsonl"), fraction=0.1):
        """Run prepare_pretrain. Returns (what it prints, meta.json)."""
        argv = self.argv(out, files, f"--val_fraction={fraction}", *flags)
        return finish("prepare_pretrain", *argv), meta(out)

    def sft(self, out, *flags, files=("chats.jsonl",), fraction=0.1, block_size=255, before=None):
        """Run prepare_sft. Returns (what it prints, meta.json)."""
        argv = self.argv(out, files, f"--val_fraction={fraction}", f"--block_size={block_size}",
                         *flags)
        return finish("prepare_sft", *argv, before=before), meta(out)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """The Corpus. Its folder is for all tests: none writes into it."""
    folder = tmp_path_factory.mktemp("small_corpus")
    make_tokenizer(folder / "tokenizer")
    write_texts(folder / "a.jsonl", texts(120))
    write_texts(folder / "b.jsonl", texts(80, 120))
    write_chats(folder / "chats.jsonl", chats(120))
    return Corpus(folder, Tokenizer.load(folder / "tokenizer"))
