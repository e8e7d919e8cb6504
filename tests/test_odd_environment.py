"""Odd surroundings: folders named like packages, few open files, two programs at once, odd keys."""
import importlib.util
import json
import os
import re
import resource
import sys

import pytest

import eval as evaluation
from minillm import export_gguf, trackers
from minillm.atomic_folder import replaced_file
from minillm.errors import UserError
from minillm.terminal import Terminal
from support import processes
from support.small_project import PRETRAIN, TRAIN


# ---- a folder with the name of a package that is not installed

@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders named wandb and gguf, where Python looks for packages; the packages are not there."""
    for name in ("wandb", "gguf"):
        (tmp_path / name).mkdir()
        monkeypatch.delitem(sys.modules, name, raising=False)
    kept = [path for path in sys.path if not os.path.exists(os.path.join(path, "gguf"))]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *kept])
    importlib.invalidate_caches()
    if importlib.util.find_spec("wandb").origin:
        pytest.skip("wandb is installed")


def test_a_folder_is_no_tracker(folders):
    """W&B itself makes one named wandb in the current folder, whether it is installed or not."""
    class Settings:
        tracker, wandb_log = "wandb", False

    with pytest.raises(UserError, match="tracker=wandb needs the package wandb: pip install"):
        trackers.names(Settings)


def test_a_folder_is_no_package_for_gguf(folders):
    with pytest.raises(UserError, match="needs the package gguf: pip install gguf"):
        export_gguf.import_gguf()


# ---- limits

def test_a_hard_limit_of_open_files(project):
    """Nothing is left behind, although removing a folder takes a free file number, too."""
    def before():
        os.closerange(3, 1 << 16)                # what the tests have open would count
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    argv = [*PRETRAIN.split(), "--val_fraction=0.1"]

    line = processes.refused("prepare_pretrain", argv, folder=project, before=before)

    assert "new: Too many open files: `ulimit -n 1024` allows more" in line
    assert not [name for name in os.listdir(project) if "new" in name]


# ---- two at once

def test_two_evaluations_at_once_share_no_file(project, monkeypatch):
    """The other one writes while this one does; each finds its own temporary file."""
    class Settings:
        out_dir = str(project / "out")
    inner = json.dump

    def dump(results, file, **options):
        monkeypatch.undo()
        processes.finish("eval", ["--out_dir=out"], folder=project)
        inner(results, file, **options)
    monkeypatch.setattr(json, "dump", dump)

    problem = evaluation.write_results(Settings, {"step": 7})

    assert problem is None
    assert json.loads((project / "out/eval.json").read_text()) == {"step": 7}
    assert not [name for name in os.listdir(project / "out") if name.endswith(".tmp")]


def test_a_file_that_could_not_be_replaced_leaves_none(tmp_path):
    (tmp_path / "folder/inside").mkdir(parents=True)

    with pytest.raises(OSError), replaced_file(tmp_path / "folder") as new, open(new, "w") as file:
        file.write("x")

    assert os.listdir(tmp_path) == ["folder"]


# ---- odd conversations

class FakeConversation:
    """Of a terminal that saves and loads."""
    turns = []

    def messages(self):
        return [{"role": "user", "content": "half \ud800 of a character"}]

    def load(self, messages):
        self.turns = messages


@pytest.fixture
def terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal = Terminal.__new__(Terminal)
    terminal.conversation, terminal.colour = FakeConversation(), False
    terminal.commands = {"save": terminal.command_save, "load": terminal.command_load,
                         "help": terminal.command_help}
    return terminal


def test_save_writes_what_load_reads(terminal, tmp_path):
    """JSON can spell half of a surrogate pair, UTF-8 cannot."""
    terminal.command("/save chat.jsonl")
    terminal.command("/load chat.jsonl")

    assert terminal.conversation.turns == terminal.conversation.messages()
    assert os.listdir(tmp_path) == ["chat.jsonl"]


@pytest.mark.parametrize("command, says", [
    ("/load deep.jsonl", "deep.jsonl is not a conversation that /save wrote"),
    ("/save a\0b", "/save needs a file name"),
    ("/save folder", "cannot write folder: it is not a file")])
def test_odd_commands_are_a_line(terminal, tmp_path, command, says):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "folder").mkdir()

    with pytest.raises(UserError, match=re.escape(says)):
        terminal.command(command)

    assert sorted(os.listdir(tmp_path)) == ["deep.jsonl", "folder"]


def test_help_without_docstrings(terminal, monkeypatch, capsys):
    """`python -OO` and PYTHONOPTIMIZE=2 drop them."""
    for command in ("save", "load", "help"):
        monkeypatch.setattr(getattr(Terminal, f"command_{command}"), "__doc__", None)

    terminal.command("/help")

    assert "/save" in capsys.readouterr().out


# ---- a path that begins with ~, which no shell expands behind "="

@pytest.mark.parametrize("program, argv, made", [
    ("train", TRAIN.replace("--out_dir=new", "--out_dir=~/run"), "run/config.py"),
    ("export", "--out_dir=out --export_dir=~/hf", "hf/config.json"),
    ("prepare_pretrain", "corpus.jsonl --tokenizer=~/tok --out_dir=~/pre", "pre/meta.json")])
def test_a_tilde_is_the_home_folder(project, tmp_path, program, argv, made):
    home = tmp_path / "home"
    home.mkdir()
    os.symlink(project / "tok", home / "tok")

    processes.finish(program, argv.split(), folder=project, env={"HOME": str(home)})

    assert (home / made).exists() and not (project / "~").exists()
