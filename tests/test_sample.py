"""sample.py: several texts in one batch, where a text ends, prompts that are too long."""
import io
import json
import os
import pty
import sys

import pytest

from minillm import generation_settings
from minillm.text_stream import printable
from support.processes import run
from support.tiny_models import talkative, tiny_model, write_folder

PROMPT = "从前"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample")
    write_folder(path / "tiny", talkative(tiny_model(block_size=2000)))
    return path


def sample(folder, *argv, **options):
    common = ["--out_dir=tiny", "--device=cpu", "--dtype=float32", "--max_new_tokens=20",
              f"--prompt={PROMPT}"]
    return run("sample", [*common, *argv], folder=folder, **options)


def records(folder, *argv):
    done = sample(folder, "--num_samples=8", "--seed=5", "--json=True", *argv)
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.fixture(scope="module")
def batch(folder):
    return records(folder)


def test_eight_in_one_batch_are_the_eight_alone(folder, batch):
    assert [record["seed"] for record in batch] == list(range(5, 13))
    assert len({record["text"] for record in batch}) == 8
    for record in batch[::3]:
        alone = sample(folder, f"--seed={record['seed']}")

        assert (alone.status, alone.err, alone.out) == (0, "", PROMPT + record["text"] + "\n")


@pytest.mark.parametrize("argv, stdin, prompt", [
    ([], f"{PROMPT}\n", PROMPT),
    ([], "", ""),
    (["--prompt=-"], PROMPT, PROMPT),
    (["--prompt="], PROMPT, ""),
    (["--prompt=山"], PROMPT, "山"),
])
def test_a_pipe_is_the_prompt_where_no_flag_is(folder, argv, stdin, prompt):
    argv = ["--out_dir=tiny", "--device=cpu", "--max_new_tokens=3", "--json", *argv]

    done = run("sample", argv, folder=folder, stdin=stdin.encode())

    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out)["prompt"] == prompt


def test_a_pipe_that_stays_open_is_waited_for_with_a_line(monkeypatch):
    reading, writing = os.pipe()
    said = []

    class Terminal(io.StringIO):
        def write(self, text):
            said.append(text)
            if len(said) == 1:                   # only now does the pipe end
                os.write(writing, PROMPT.encode())
                os.close(writing)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdin", open(reading))
    monkeypatch.setattr(generation_settings, "WAIT", 0.01)

    prompt = generation_settings.read_prompt("-")

    assert prompt == PROMPT
    assert said[0] == "waiting for the end of stdin; --prompt=TEXT reads none"


def test_one_file_is_a_model_too(folder):
    of_folder = sample(folder, "--seed=5")

    of_file = sample(folder, "--seed=5", "--out_dir=tiny/ckpt_00000007.pt")

    assert (of_file.status, of_file.err) == (0, "")
    assert of_file.out == of_folder.out


def test_several_are_shown_with_a_line_between(folder, batch):
    shown = sample(folder, "--num_samples=3", "--seed=5").out

    texts = [PROMPT + record["text"] for record in batch[:3]]
    assert shown == "\n---------------\n".join(texts) + "\n"


def test_a_terminal_gets_no_control_characters(folder):
    """A model that has learned little makes them, and they would ring, and move the cursor."""
    argv = ["--temperature=100", "--top_k=0", "--max_new_tokens=300", "--seed=5"]
    raw = sample(folder, *argv).out
    ours, theirs = pty.openpty()

    def before():
        sys.stdout = open(theirs, "w", encoding="utf-8")
    done = sample(folder, *argv, before=before)

    assert done.status == 0, done.err
    shown = os.read(ours, 1 << 16).decode().replace("\r\n", "\n")
    assert shown == printable(raw) and len(shown) < len(raw)


def test_a_stop_string_ends_each_text_by_itself(folder, batch):
    stop = batch[0]["text"][5:7]

    stopped = records(folder, f"--stop={stop}")

    for record, free in zip(stopped, batch):
        assert record["text"] == free["text"].partition(stop)[0]
        assert record["finish"] == ("stop" if stop in free["text"] else "length")


def test_a_long_prompt_is_refused_or_truncated(folder):
    long = "--prompt=" + "长" * 999

    assert sample(folder, long).status == 2
    assert sample(folder, long, "--truncate_ctx=100", "--seed=1").status == 0
