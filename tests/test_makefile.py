"""make demo: an interrupted run resumes; what newer code or data would change starts over."""
import importlib
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from support import ROOT

SOURCES = ("requirements.txt", "train_tokenizer.py", "prepare_pretrain.py", "demo/town.py",
           "train.py", "model.py", "moe.py")
MADE = (".venv/installed", "data/demo/tokenizer/tokenizer.json", "data/demo/pretrain/meta.json")
CHECKPOINT = "out/demo_pretrain/ckpt_00000100.pt"


def touch(folder, name, seconds):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (seconds, seconds))


@pytest.fixture
def project(tmp_path):
    """The Makefile, with empty files for the sources and for what is made before pretraining."""
    shutil.copy(os.path.join(ROOT, "Makefile"), tmp_path)
    for name in SOURCES:
        touch(tmp_path, name, seconds=1000)
    for number, name in enumerate(MADE):
        touch(tmp_path, name, seconds=2000 + number)
    return tmp_path


def train_command(folder):
    """What make would run to train the demo's first model."""
    done = subprocess.run(["make", "-n", "out/demo_pretrain/done"], cwd=folder, check=True,
                          capture_output=True, encoding="utf-8")
    return re.search(r"^\.venv/bin/python (train\.py .*)$", done.stdout, re.MULTILINE)[1]


def run_demo(folder, last_step):
    """make the first model with a train.py of 600 steps that saves `last_step` and exits 0."""
    python = folder / ".venv/bin/python"
    python.parent.mkdir(exist_ok=True)
    python.write_text("#!/bin/sh\nmkdir -p out/demo_pretrain && cd out/demo_pretrain || exit 1\n"
                      f"echo '# steps: 600' > config.py; touch ckpt_{last_step:08d}.pt\n")
    python.chmod(0o755)
    return subprocess.run(["make", "out/demo_pretrain/done"], cwd=folder, capture_output=True,
                          encoding="utf-8")


pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def test_a_new_run_starts_over(project):
    assert train_command(project) == "train.py --overwrite=True"


def test_a_python_that_is_too_old_installs_nothing(project):
    """false stands for it: what is asked of it fails."""
    done = subprocess.run(["make", "--no-print-directory", "-B", ".venv/installed", "PYTHON=false"],
                          cwd=project, capture_output=True, encoding="utf-8")

    assert done.returncode == 2 and not (project / ".venv/bin").exists()
    assert done.stdout == "false is not Python 3.11 or newer: try make demo PYTHON=python3.12\n"


def test_the_installation_names_the_mirror_of_the_faq(project):
    done = subprocess.run(["make", "-nB", ".venv/installed"], cwd=project, check=True,
                          capture_output=True, encoding="utf-8")

    command = re.search("PIP_INDEX_URL=.* make demo", done.stdout)[0]
    for name in ("docs/FAQ.md", "docs/FAQ_ZH.md", "README_ZH.md"):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            assert command in file.read()


def test_an_interrupted_run_resumes(project):
    touch(project, CHECKPOINT, seconds=3000)

    assert train_command(project) == "train.py --init_from=resume"


@pytest.mark.parametrize("name", ["train.py", "data/demo/pretrain/meta.json"])
def test_a_run_of_older_code_or_data_starts_over(project, name):
    touch(project, CHECKPOINT, seconds=3000)
    touch(project, name, seconds=4000)

    assert train_command(project) == "train.py --overwrite=True"


def test_a_run_that_has_ended_starts_over_when_the_code_changes(project):
    touch(project, CHECKPOINT, seconds=3000)
    touch(project, "out/demo_pretrain/done", seconds=3001)
    touch(project, "train.py", seconds=2999)
    touch(project, "model.py", seconds=4000)

    assert train_command(project) == "train.py --overwrite=True"


def test_a_run_that_was_told_to_stop_has_not_ended(project):
    stopped = run_demo(project, last_step=300)

    assert stopped.returncode and "stopped before its last step" in stopped.stdout
    assert not (project / "out/demo_pretrain/done").exists()
    assert train_command(project) == "train.py --init_from=resume"


def test_a_run_that_saved_its_last_step_has_ended(project):
    assert run_demo(project, last_step=600).returncode == 0
    assert (project / "out/demo_pretrain/done").exists()


@pytest.mark.parametrize("stale, made", [
    ("out/demo_sft/eval.json", ["out/demo_sft"]), ("", [])])
def test_an_evaluation_that_the_table_cannot_use_is_made_again(project, stale, made):
    """Somebody has run eval.py on another checkpoint, or with other questions."""
    seconds = 5000
    for name in ("eval.py", "prepare_sft.py", "data/demo/sft/meta.json", "config/demo_sft.py",
                 "out/demo_pretrain/done", "out/demo_sft/done", "out/demo_control/done",
                 "out/demo_sft/eval.json", "out/demo_control/eval.json"):
        seconds += 1
        touch(project, name, seconds)
    python = project / ".venv/bin/python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f"#!/bin/sh\n[ $2 != demo.report ] || echo {stale}\n")
    python.chmod(0o755)

    done = subprocess.run(["make", "-n", "demo"], cwd=project, check=True, capture_output=True,
                          encoding="utf-8")

    assert re.findall(r"^\.venv/bin/python eval.py --out_dir=(\S+)", done.stdout, re.M) == made


@pytest.mark.parametrize("program, stage", [
    ("sample", "pretrain"), ("chat", "sft"), ("eval", "sft"), ("export", "sft"), ("serve", "sft")])
def test_a_program_without_flags_opens_what_make_demo_has_trained(program, stage):
    made = (pathlib.Path(ROOT) / "Makefile").read_text(encoding="utf-8")
    assert "NAME := demo\n" in made and "OUT := out/$(NAME)\n" in made
    assert f"$(OUT)_{stage}" in made

    assert importlib.import_module(program).Settings().out_dir == f"out/demo_{stage}"
