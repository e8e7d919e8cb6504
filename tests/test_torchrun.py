"""torchrun: a job whose worker is killed ends, or with --max-restarts continues exactly.

Its processes import everything anew, so these tests take their time.
"""
import os
import signal
import subprocess
import sys

import pytest

from support import ROOT
from support.processes import LIMIT
from support.training_runs import TINY, assert_same_run, finish_ranks, make_data

# train.py that writes down its process id, and of which one rank is killed in the first attempt
SCRIPT = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train
from minillm.errors import run
from support.training_runs import die_at
with open({folder!r} + "/pids", "a") as file:
    file.write(str(os.getpid()) + "\\n")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "{victim}":
    die_at(22)
run(train.main)
"""


class Job:
    """torchrun with two workers."""

    def __init__(self, folder):
        self.folder, self.launcher = folder, None

    def run(self, *argv, victim, flags=()):
        """Run it to its end; rank `victim` is killed at step 22. Returns torchrun's exit status."""
        script = SCRIPT.format(root=ROOT, folder=str(self.folder), victim=victim)
        (self.folder / "train.py").write_text(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", *flags, str(self.folder / "train.py"), *argv]
        with open(self.folder / "log", "w") as log:
            self.launcher = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log,
                                             env=os.environ | {"OMP_NUM_THREADS": "1"})
        return self.launcher.wait(LIMIT)

    def output(self):
        return (self.folder / "log").read_text()

    def alive(self):
        """The ids of the workers that are still there."""
        script = str(self.folder / "train.py")
        pids = (self.folder / "pids").read_text().split()
        # the id of one that has ended may by now be another program's
        return [int(pid) for pid in pids if script in command_line(pid)]

    def end(self):
        """Leave nothing running, however the test ended."""
        self.launcher.kill()
        self.launcher.wait()
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)


def command_line(pid):
    """The arguments of a running process; none if it has ended."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    yield job
    job.end()


def test_torchrun_ends_when_a_worker_is_killed(job, tmp_path):
    data = make_data(tmp_path / "data")

    status = job.run(*TINY, "--optimizer=muon", f"--data_dir={data}", f"--out_dir={tmp_path}/out",
                     victim=1)

    assert status != 0
    assert job.alive() == []
    assert "Signal 9 (SIGKILL)" in job.output()
    assert "FutureWarning" not in job.output()


def test_torchrun_restarts_and_continues_exactly(job, tmp_path):
    data = make_data(tmp_path / "data")
    argv = [*TINY, "--max_iters=40", f"--data_dir={data}"]
    finish_ranks(2, [*argv, f"--out_dir={tmp_path}/straight"])

    status = job.run(*argv, f"--out_dir={tmp_path}/out", victim=0, flags=["--max-restarts=1"])

    assert status == 0, job.output()
    assert "resuming at step 20" in job.output()
    assert_same_run(tmp_path / "straight", tmp_path / "out")
