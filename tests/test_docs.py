"""What the documents say is so: excerpts, printed outputs, commands, flags, links, sizes."""
import dataclasses
import importlib
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import unicodedata
import urllib.request

import pytest
import torch

from minillm.errors import UserError
from model import GPT, GPTConfig
from scripts import excerpts, pictures
from support import ROOT

PAIRS = [("README.md", "README_ZH.md"), ("docs/TOUR.md", "docs/TOUR_ZH.md"),
         ("docs/FAQ.md", "docs/FAQ_ZH.md")]
DOCUMENTS = [path for pair in PAIRS for path in pair] + ["CONTRIBUTING.md", "LOG.md"]
PROGRAMS = ["train_tokenizer", "prepare_pretrain", "prepare_sft", "train", "eval", "sample", "chat",
            "export", "serve", "bench.train", "bench.decode", "bench.data", "bench.serve", "bench.memory",
            "scripts.plot", "scripts.pictures", "scripts.excerpts", "demo.town"]
# flags of other programs: pip, git, torchrun, download_data.sh
ELSEWHERE = {"standalone", "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id",
             "max-restarts", "part", "huggingface", "out", "help"}


def read(path):
    return pathlib.Path(ROOT, path).read_text("utf-8")


def commands(path):
    """The commands of a document's bash blocks, without comments; continued lines are joined."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", read(path), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", "").splitlines():
            command = re.sub(r"\s+# .*", "", line).strip()
            found.append(" ".join(command.split()))
    return [command for command in found if command]


def prose(path):
    """[(number, line)] outside code blocks, tables and comments."""
    lines, inside = [], False
    for number, line in enumerate(read(path).splitlines(), 1):
        if line.startswith("```") or line.startswith("<!--") or line.strip() == "-->":
            inside = not inside and not line.endswith("-->")
        elif not inside and not line.startswith(("|", "    ")):
            lines.append((number, line))
    return lines


def columns(text):
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def settings_of(program):
    return {field.name for field in dataclasses.fields(importlib.import_module(program).Settings)}


def fresh_copy(folder):
    """The project as a clone would have it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.exists(os.path.join(ROOT, name)):
            shutil.copy(os.path.join(ROOT, name), target)
    return folder


def run_python(folder, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True,
                          encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


# ---- excerpts, outputs, pictures

@pytest.mark.parametrize("path", PAIRS[1])
def test_code_excerpts_are_true(path):
    text = read(path)

    assert excerpts.refreshed(text, repeat=False) == text, "refresh: scripts/excerpts.py --write"


def test_both_tours_run_the_same_and_print_the_same():
    blocks = [excerpts.BLOCK.findall(read(path)) for path in PAIRS[1]]

    assert blocks[0] == blocks[1] and len(blocks[0]) > 20


def test_a_stale_excerpt_is_seen():
    text = read("docs/TOUR.md").replace("epoch = position // n_windows", "epoch = 0")

    assert excerpts.refreshed(text, repeat=False) != text


def test_a_quoted_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match="cannot read .*nosuch.py: No such file"):
        excerpts.excerpt("nosuch.py main")


def test_printed_outputs_and_pictures_are_true_on_a_fresh_copy(tmp_path):
    copy = fresh_copy(tmp_path)
    for stage in ("train_tokenizer.py", "prepare_pretrain.py", "prepare_sft.py"):
        run_python(copy, stage)

    run_python(copy, "scripts/excerpts.py", "docs/TOUR.md")
    run_python(copy, "scripts/pictures.py", "--out_dir=data")

    drawn = sorted(path.name for path in (copy / "data").glob("*.svg"))
    assert len(drawn) == 2 * len(pictures.NEED_NO_RUN)
    for name in drawn:
        assert (copy / "data" / name).read_text() == read(f"assets/{name}"), name


# ---- commands, flags, links

@pytest.mark.parametrize("path", [path for pair in PAIRS for path in pair])
def test_a_comment_beside_a_command_can_be_pasted_into_zsh(path):
    """It takes the words for arguments: harmless as long as none means something to a shell."""
    for block in re.findall(r"^```bash\n(.*?)^```$", read(path), re.DOTALL | re.MULTILINE):
        for comment in re.findall(r"\s# (.*)", block):
            assert not set(comment) & set("'\"`()[]{}<>*?|&;$!~\\"), comment


@pytest.mark.parametrize("english, chinese", PAIRS)
def test_both_languages_give_the_same_commands(english, chinese):
    assert commands(english) == commands(chinese) != []


@pytest.mark.parametrize("path", DOCUMENTS)
def test_flags_of_commands_exist(path):
    for command in commands(path):
        program = re.search(r"([\w/]+)\.py|-m ([\w.]+)", command)
        if not program or command.startswith(("git", "pip")):
            continue
        name = (program[1] or program[2]).replace("/", ".")
        if name in PROGRAMS:
            flags = re.findall(r"--([\w-]+)", command[program.end():])
            assert set(flags) <= settings_of(name) | {"help"}, command


@pytest.mark.parametrize("path", DOCUMENTS)
def test_flags_named_in_the_text_exist(path):
    known = set.union(*map(settings_of, PROGRAMS)) | ELSEWHERE
    quoted = re.findall(r"`([^`\n]*--[^`]*)`", read(path))
    named = {flag for text in quoted for flag in re.findall(r"--([a-z][\w-]*)", text)}

    assert named <= known


def anchor(heading):
    """What GitHub calls a heading."""
    kept = [char for char in heading.strip().lower() if char.isalnum() or char in " -_"]
    return "".join(kept).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_lead_somewhere(path):
    here = pathlib.Path(ROOT, path).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if link.startswith("http"):
            continue
        file, _, fragment = link.partition("#")
        target = here / file if file else pathlib.Path(ROOT, path)
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), link


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != "LOG.md"])
def test_files_named_exist(path):
    made = ("data/", "out/", "/tmp/", "hf/")
    text = re.sub(r"^```(python|console)\n.*?^```$", "", read(path), flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.(?:py|md|sh|ipynb|txt))\b", text):
        if not name.startswith(made):
            folders = ("", "config/", "docs/", "minillm/", "tests/")
            assert any(os.path.exists(f"{ROOT}/{folder}{name}") for folder in folders), name


def test_every_picture_is_used():
    text = "".join(map(read, DOCUMENTS))
    text += read("scripts/pictures.py") + read("scripts/curves.py")

    unused = [path.name for path in pathlib.Path(ROOT, "assets").iterdir()
              if path.suffix == ".svg" and path.name not in text or path.stem not in text]

    assert unused == []


# ---- form

@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != "LOG.md"])
def test_lines_are_short(path):
    wide = [(number, line) for number, line in prose(path) if columns(line) > 100]

    assert wide == []


@pytest.mark.parametrize("path", PAIRS[0])
def test_readme_is_short(path):
    assert read(path).count("\n") <= 200


@pytest.mark.parametrize("path", DOCUMENTS)
def test_nothing_is_left_open(path):
    assert re.findall("⟨[A-Z_0-9]+⟩", read(path)) == []


@pytest.mark.parametrize("name, millions", [("tiny", 25), ("small", 61), ("large", 347)])
def test_configurations_have_the_size_that_the_table_says(name, millions):
    shape = runpy.run_path(f"{ROOT}/config/pretrain.py")
    shape |= runpy.run_path(f"{ROOT}/config/{name}.py")
    names = {field.name for field in dataclasses.fields(GPTConfig)}

    with torch.device("meta"):
        model = GPT(GPTConfig(**{key: shape[key] for key in names & shape.keys()}))

    assert round(model.n_params()[0] / 1e6) == millions
    assert f"`{name}.py`" in read("README.md") and f"{millions}M" in read("README.md")


# ---- every command of the README, in order, on a fresh copy; what needs a GPU with a tiny model

TINY = ("--device=cpu --compile=False --n_layer=1 --n_head=2 --n_kv_head=1 --n_embd=32 "
        "--block_size=512 --batch_size=2 --gradient_accumulation_steps=2 --max_iters=2 "
        "--eval_interval=0")
SHAPE = r"--n_\w+=\d+ ?"


def tiny(command):
    """A command of the README as this machine can run it in seconds; None: it is not for here."""
    if command.startswith(("git clone", "pip install")):
        return None
    if command == "make demo":
        return ("python train_tokenizer.py && python prepare_pretrain.py && "
                "python prepare_sft.py && python train.py --max_iters=2 --eval_interval=0 && "
                "python train.py config/demo_sft.py --epochs=0 --max_iters=2 --eval_interval=0")
    if command.startswith(".venv/bin/python chat.py"):
        return "echo 你好 | python chat.py"
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=2")
    if "train.py config" in command and "--inspect_step" not in command:
        flags = TINY if "pretrain.py" in command else re.sub(SHAPE, "", TINY)
        command = f"{command} {flags}"
    if "moe" in command:
        command = command.replace("--n_embd=32", "--n_embd=32 --n_expert=4 --n_expert_per_tok=2")
    if command.startswith("python train_tokenizer.py"):
        command = command.replace("--vocab_size=32000", "--vocab_size=400")
    if command.startswith("python serve.py"):
        command += " --port=0"
    if command.startswith("python chat.py"):
        command = f"echo 你好 | {command}"
    if re.match("python (chat|sample).py", command) or "| python chat.py" in command:
        command += " --max_new_tokens=4"
    return command


def corpora(folder):
    """Stand-ins for the two downloads, under their names: the script then fetches nothing."""
    run_python(folder, "-m", "demo.town", "--out_dir=data/raw")
    os.rename(folder / "data/raw/pretrain.jsonl", folder / "data/raw/seq_monkey_part.jsonl")
    os.rename(folder / "data/raw/sft.jsonl", folder / "data/raw/train_3.5M_CN.json")


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_order(tmp_path):
    copy = fresh_copy(tmp_path)
    os.symlink(os.path.dirname(os.path.dirname(sys.executable)), copy / ".venv")
    corpora(copy)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    for command in filter(None, map(tiny, commands("README.md"))):
        print(command, flush=True)
        serving = command.startswith("python serve.py")
        shell = ["bash", "-c", "exec " + command if serving else command]
        child = subprocess.Popen(shell, cwd=copy, env=env, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT)
        if serving:
            line = next(line for line in child.stdout if b"http" in line)
            urllib.request.urlopen(re.search(rb"http://\S+", line)[0].decode())
            child.send_signal(signal.SIGTERM)
        output, _ = child.communicate()
        assert child.returncode == 0, f"{command}\n{output.decode()}"


@pytest.mark.slow
def test_python_of_the_documents_runs(tmp_path):
    copy = fresh_copy(tmp_path)
    for stage in ("train_tokenizer.py", "prepare_pretrain.py"):
        run_python(copy, stage)
    run_python(copy, "train.py", "--out_dir=out/small_sft", "--max_iters=2", "--eval_interval=0")
    [block] = re.findall(r"^```python\n(.*?)^```$", read("docs/FAQ.md"), re.DOTALL | re.MULTILINE)

    run_python(copy, "-c", block)


def test_notebook_was_executed_to_its_end():
    cells = json.loads(read("notebooks/demo.ipynb"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]

    assert all(cell["outputs"] for cell in code)
    assert {output["output_type"] for cell in code for output in cell["outputs"]} == {"stream"}
    assert "questions answered exactly" in str(code)
