"""Settings: types with bounds, allowed values, config files, flags, and the text of --help."""
import math
from dataclasses import dataclass
from typing import Literal

import pytest

from minillm.configurator import (BelowOne, Fraction, NonNegativeFloat, Positive, configure,
                                  help_text, number, positional, whole)
from minillm.errors import UserError


@dataclass
class Settings:
    files: list[str] = positional()             # text to read
    # the model
    n_layer: whole(1, 10_000) = 2               # blocks
    dropout: BelowOne = 0.0                     # share of zeros
    # the data of a step,
    # over all processes
    batch_size: Positive = 16                   # windows
    top_p: Fraction = 1.0                       # probability mass
    rate: NonNegativeFloat = 0.1                # step size
    scale: number(above=0) | None = None        # None: the default
    dtype: Literal["auto", "float32"] = "auto"  # of the matmuls
    theta: number(1) = 1e4                      # base

    def method(self):
        # a comment that is no heading
        name: int = 3                           # and no field
        return name


def test_bounds_hold_for_flags_and_config_files(tmp_path):
    config = tmp_path / "A.PY"
    config.write_text("batch_size = 0\n")

    with pytest.raises(UserError, match="^batch_size=0 must be at least 1$"):
        configure(Settings, [str(config)])
    assert configure(Settings, [str(config), "--batch_size=3"]).batch_size == 3


@pytest.mark.parametrize("flag, message", [
    ("--n_layer=0", "n_layer=0 must be at least 1 and at most 10,000"),
    ("--n_layer=1e9", "n_layer=1000000000 must be at least 1 and at most 10,000"),
    ("--batch_size=1e11", "batch_size=100000000000 must be at least 1 and at most 10,000,000,000"),
    ("--dropout=1", "dropout=1.0 must be at least 0 and below 1"),
    ("--dropout=nan", "dropout=nan must be at least 0 and below 1"),
    ("--top_p=1.01", "top_p=1.01 must be at least 0 and at most 1"),
    ("--rate=-1", "rate=-1.0 must be at least 0"),
    ("--rate=inf", "rate=inf must be at least 0 and at most 10,000,000,000"),
    ("--scale=0", "scale=0.0 must be above 0"),
    ("--theta=nan", "theta=nan must be at least 1"),
    ("--dtype=int4", "dtype=int4 must be one of auto, float32"),
    ("--bs=4", "unknown flag --bs: did you mean batch_size?"),
    ("--lyer=4", "unknown flag --lyer: did you mean n_layer?"),
    ("--s=4", "unknown flag --s: see --help"),
])
def test_a_wrong_flag_is_named_with_what_would_fit(flag, message):
    with pytest.raises(UserError) as error:
        configure(Settings, [flag])

    assert str(error.value) == message


def test_values_at_their_bounds_are_allowed():
    s = configure(Settings, ["--n_layer=10000", "--dropout=0", "--top_p=1", "--scale=None"])

    assert (s.n_layer, s.dropout, s.top_p, s.scale) == (10_000, 0.0, 1.0, None)
    assert math.isclose(configure(Settings, ["--scale", "1e-9"]).scale, 1e-9)


def test_a_comment_behind_the_arguments_is_none():
    """As in the documents' commands: zsh takes what is pasted there for arguments."""
    settings = configure(Settings, ["a.txt", "--n_layer=3", "#", "61M,", "--card", "b.txt"])

    assert (settings.files, settings.n_layer) == (["a.txt"], 3)


def test_help_prints_the_headings_of_the_source():
    text = help_text(Settings)

    assert "\n\nthe model\n  --n_layer=2 " in text
    assert "\n\nthe data of a step, over all processes\n  --batch_size=16 " in text
    assert "FILE... " in text and "no heading" not in text and "--name" not in text


def test_help_shows_choices_and_what_stands_for_none():
    text = help_text(Settings)

    assert "  --dtype=auto                       {auto,float32} of the matmuls\n" in text
    assert "  --scale=auto  " in text and "None: the default" in text
    assert configure(Settings, ["--scale=2", "--scale=auto"]).scale is None


@pytest.mark.parametrize("source, message", [
    ("for i in range(3):\n    pass\n", "unknown key in {path}: i: see --help (begin a name that "
                                       "is no setting with _)"),
    ("batchsize = 8\n", "unknown key in {path}: batchsize: did you mean batch_size? (begin a name "
                        "that is no setting with _)"),
    ("_half = 0.5\n\nbatch_size = _half.size\n",
     "config file {path}, line 3: AttributeError: 'float' object has no attribute 'size'"),
    ("batch_size = [8\n",
     "config file {path}: SyntaxError: '[' was never closed (a.py, line 1)"),
], ids=["a loop's variable", "a typo", "code that fails", "no Python"])
def test_a_config_file_s_fault_is_named_with_its_place(source, message, tmp_path):
    config = tmp_path / "a.py"
    config.write_text(source)

    with pytest.raises(UserError) as error:
        configure(Settings, [str(config)])

    assert str(error.value) == message.format(path=config)
