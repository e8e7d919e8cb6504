"""A checkpoint or config.py from a stranger: what it would run is never run."""
import io
import os
import pickle
import shutil
import zipfile

import pytest
import torch

from minillm import checkpoint, run_folder
from minillm.errors import UserError
from model import GPT
from support.training_runs import SHORT, finish, refused


@pytest.fixture(scope="module")
def honest(data, tmp_path_factory):
    """A finished run, with checkpoints of steps 15 and 20."""
    out = tmp_path_factory.mktemp("honest") / "out"
    finish([*SHORT, f"--data_dir={data}", f"--out_dir={out}"])
    return out


class Payload:
    """Runs a command where its pickle is trusted."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def beside_honest_tensors(payload, state):
    file = io.BytesIO()
    torch.save(state | {"extra": payload}, file)
    return file.getvalue()


def alone(payload, state):
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


def old_format(payload, state):
    file = io.BytesIO()
    torch.save(state | {"extra": payload}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def plain_pickle(payload, state):
    return pickle.dumps(payload)


def hand_made_zip(payload, state):
    """A zip with a pickle that torch did not write."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        # protocol 2, as torch writes it: another one makes torch warn
        archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


HOSTILE = [beside_honest_tensors, alone, old_format, plain_pickle, hand_made_zip]


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_hostile_checkpoint_executes_nothing(data, honest, tmp_path, make):
    """It is refused in one line by resuming, by starting from it and by generating from it."""
    touched, out = tmp_path / "touched", tmp_path / "out"
    shutil.copytree(honest, out)
    state = torch.load(checkpoint.step_path(honest, 20))
    content = make(Payload(f"touch {touched}"), state)
    for step in checkpoint.saved_steps(out):
        with open(checkpoint.step_path(out, step), "wb") as file:
            file.write(content)

    argv = [*SHORT, f"--data_dir={data}"]
    line = refused([*argv, f"--out_dir={out}", "--init_from=resume"])
    refused([*argv, f"--out_dir={tmp_path}/new", f"--init_from={out}"])
    with pytest.raises(UserError):
        GPT.from_checkpoint(str(out), device="cpu")

    assert "every checkpoint in" in line
    assert not os.path.exists(touched)


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_the_payload_is_a_real_one(tmp_path, make):
    """Where pickles are trusted, the command runs."""
    touched = tmp_path / "touched"
    content = make(Payload(f"touch {touched}"), {})

    if make is plain_pickle:
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)

    assert os.path.exists(touched)


def test_a_hostile_config_executes_nothing(honest, tmp_path):
    shutil.copytree(honest, tmp_path / "out")
    with open(tmp_path / "out/config.py", "a") as file:
        file.write(f"seed = __import__('os').system('touch {tmp_path}/touched')\n")

    with pytest.raises(UserError, match="config.py"):
        run_folder.read_settings(tmp_path / "out")

    assert not os.path.exists(tmp_path / "touched")
