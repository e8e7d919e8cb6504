"""What a program is started with: streams that fail, a folder that is gone, a terminal that closes.

A full stdout, stderr or stdin is as likely as a full disk: they are files.
"""
import os
import pty
import select
import signal
import subprocess
import sys
import threading

import pytest

from support import ROOT, processes
from support.processes import LIMIT
from support.small_project import PRETRAIN
from support.training_runs import TINY, finish, newest, numbers, on_step

SHORT = [*TINY, "--max_iters=6", "--eval_interval=3"]
STDIN = ["--out_dir=out", "--max_new_tokens=3", "--temperature=0", "--json"]


def lead(number, path, flags=os.O_WRONLY):
    """A function that lets stream `number` of this process lead to a file."""
    return lambda: os.dup2(os.open(path, flags | os.O_CREAT), number)


# ---- a full disk

@pytest.mark.parametrize("program, argv", [
    ("sample", "--out_dir=out --max_new_tokens=5"),
    ("chat", "--out_dir=out --max_new_tokens=5 --prompt=你好"),
    ("eval", "--out_dir=out"),
    ("eval", "--out_dir=out --json"),
    ("export", "--out_dir=out"),
    ("prepare_pretrain", PRETRAIN + "--val_fraction=0.1"),
    ("train", "--help"),
])
def test_stdout_on_a_full_disk_is_one_line(project, program, argv):
    done = processes.run(program, argv.split(), folder=project, before=lead(1, "/dev/full"))

    assert done.status == 2
    assert done.err == f"{program}.py: cannot write the output: No space left on device\n"


def test_stderr_on_a_full_disk_keeps_the_exit_status(project):
    done = processes.run("train", ["--bad"], folder=project, before=lead(2, "/dev/full"))

    assert done.status == 2 and done.output == ""


def test_training_goes_on_where_nobody_reads(data, tmp_path):
    def before():
        lead(1, "/dev/full")()
        lead(2, "/dev/full")()

    finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    assert newest(tmp_path / "out")["step"] == 6


def test_a_tokenizer_is_saved_whatever_becomes_of_stdout(project):
    """In a terminal, where progress is shown: the trainer's own bar would panic."""
    def before():
        _, terminal = pty.openpty()
        os.dup2(terminal, 2)
        lead(1, "/dev/full")()

    done = processes.run("train_tokenizer", ["corpus.jsonl", "--vocab_size=300", "--out_dir=new"],
                         folder=project, before=before)

    assert done.status == 2 and (project / "new/tokenizer.json").exists()


def test_a_pipe_gets_each_line_at_once():
    """Also `train.py > log`, followed with `tail -f`. The program ends when it may read."""
    code = "import sys; from minillm.errors import run; run(lambda: (print(1), sys.stdin.read()))"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with program:
        assert select.select([program.stdout], [], [], LIMIT)[0]
        assert program.stdout.readline() == b"1\n"
        program.stdin.close()


# ---- stdin

def test_stdin_that_does_not_wait(project):
    """Another program that shares it has made it return what is there, which is nothing yet."""
    def before():
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.dup2(read, 0)

        def say():
            os.write(write, "天".encode())
            os.close(write)
        threading.Timer(0.3, say).start()

    output = processes.finish("sample", [*STDIN, "--prompt=-"], folder=project, before=before)

    assert '{"prompt": "天", ' in output


@pytest.mark.parametrize("program, argv", [("sample", ["--prompt=-"]), ("chat", [])])
def test_stdin_for_writing_alone(project, tmp_path, program, argv):
    line = processes.refused(program, [*STDIN, *argv], folder=project,
                             before=lead(0, tmp_path / "file"))

    assert line == f"{program}.py: cannot read stdin: Bad file descriptor"


# ---- the current folder

@pytest.mark.parametrize("program", ["train", "sample", "prepare_pretrain"])
def test_a_current_folder_that_was_deleted(tmp_path, program):
    def before():
        os.mkdir(tmp_path / "gone")
        os.chdir(tmp_path / "gone")
        os.rmdir(tmp_path / "gone")

    line = processes.refused(program, [], before=before)

    assert line == f"{program}.py: the current folder was deleted: cd to one that is there"


# ---- the terminal

def test_a_terminal_that_closes_ends_the_run_with_a_checkpoint(data, tmp_path):
    def before():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        on_step(lambda step: os.kill(os.getpid(), signal.SIGHUP) if step == 2 else None)

    output = finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    assert "SIGHUP: finishing this step, then saving" in output
    assert newest(tmp_path / "out")["step"] == 3


def test_nohup_is_heard(data, tmp_path):
    def before():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        on_step(lambda step: os.kill(os.getpid(), signal.SIGHUP) if step == 2 else None)

    finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before)

    assert newest(tmp_path / "out")["step"] == 6


@pytest.mark.parametrize("columns", ["0", "1", "none"])
def test_a_terminal_that_is_lost_on_the_way(data, tmp_path, columns):
    """The connection broke, the run had been disowned; its terminal had an odd width before."""
    def before():
        ours, theirs = pty.openpty()
        os.dup2(theirs, 2)
        os.close(theirs)
        on_step(lambda step: os.close(ours) if step == 2 else None)

    finish([*SHORT, f"--data_dir={data}", f"--out_dir={tmp_path}/out"], before=before,
           env={"COLUMNS": columns, "TERM": "dumb"})

    assert newest(tmp_path / "out")["step"] == 6 and numbers(tmp_path / "out")[-1]["step"] == 6
