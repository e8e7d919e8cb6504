"""scripts/plot.py: runs that have ended, were killed, or go on while they are watched."""
import json
import sys
import warnings

import pytest

from minillm.errors import UserError
from scripts import plot
from support import processes
from support.processes import refused
from support.training_runs import TINY, Run, die_at, finish, make_data

STEPS = [{"step": n, "loss": 3.0 - n / 10, "tokens": 1000 * (n + 1)} for n in range(1, 5)]
END = {"step": 5, "seconds": 9.5, "tokens": 5000, "parameters": 80, "active_parameters": 70}


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return str(path)


def test_losses_over_tokens(tmp_path):
    run = plot.Run(write(tmp_path / "a.jsonl", [*STEPS, END]))

    assert run.label == "a" and run.has_ended
    assert run.points("loss", "step")[0] == (1, 2.9)
    assert run.points("loss", "tokens")[0] == (2000, 2.9)
    assert run.points("loss", "flops")[0] == (6 * 70 * 2000, 2.9)
    assert run.points("val_loss", "tokens") == []


def test_an_older_run_counts_tokens_at_its_end(tmp_path):
    steps = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "val_loss": 1.5}]
    run = plot.Run(write(tmp_path / "a.jsonl", [*steps, END]))

    assert run.points("loss", "tokens") == [(1000, 2.0)]
    assert run.points("val_loss", "tokens") == [(3000, 1.5)]


def test_half_a_line_is_still_being_written(tmp_path):
    run = plot.Run("going=" + write(tmp_path / "a.jsonl", STEPS, tail='{"step": 5, "lo'))

    assert run.label == "going" and not run.has_ended
    assert len(run.points("loss", "tokens")) == 4


def test_an_equals_sign_in_a_path_is_no_label(tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    write(tmp_path / "lr=0.1" / "metrics.jsonl", STEPS)

    assert plot.Run(str(tmp_path / "lr=0.1")).label == "lr=0.1"
    assert plot.Run(f"lr=0.1, mine={tmp_path}/lr=0.1").label == "lr=0.1, mine"


@pytest.mark.parametrize("text, says", [
    ("not JSON\n", "it is not JSON lines"),
    ("[1]\n", "it has no step"),
    ('{"step": null}\n', "it has no step"),
    ('{"step": 1, "loss": 2}\n', "does not count tokens yet: give --x=step"),
])
def test_what_cannot_be_drawn(tmp_path, text, says):
    (tmp_path / "a.jsonl").write_text(text)

    with pytest.raises(UserError, match=says):
        plot.Run(str(tmp_path / "a.jsonl")).points("loss", "tokens")


def test_a_killed_run_that_resumed(tmp_path):
    """Real records, after the kill and after the resume: tokens count from the first step."""
    argv = [*TINY, f"--data_dir={make_data(tmp_path / 'data')}", f"--out_dir={tmp_path}/out"]
    killed = Run(argv, before=lambda: die_at(17))
    assert killed.wait() == -9

    after_the_kill = plot.Run(str(tmp_path / "out"))
    finish([*argv, "--init_from=resume"])
    at_the_end = plot.Run(str(tmp_path / "out"))

    windows, length = 4, 32
    assert not after_the_kill.has_ended and at_the_end.has_ended
    assert after_the_kill.points("loss", "tokens")[-1][0] == 17 * windows * length
    for (step, loss), (tokens, same) in zip(at_the_end.points("loss", "step"),
                                            at_the_end.points("loss", "tokens")):
        assert tokens == (step + 1) * windows * length and loss == same
    assert at_the_end.last_with("tokens")["tokens"] == 60 * windows * length


def test_watching_draws_again_until_the_run_ends(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "a.jsonl", tmp_path / "a.png"
    write(path, STEPS[:2])
    later = iter([STEPS[:2], STEPS[:3], STEPS, [*STEPS, END]])
    drawn = []
    draw = plot.draw

    def counted(runs, s):
        drawn.append(len(runs[0].records))
        draw(runs, s)
    monkeypatch.setattr(plot, "draw", counted)
    monkeypatch.setattr(plot.time, "sleep", lambda _: write(path, next(later)))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(path), f"--out={picture}", "--watch"])

    plot.main()

    assert drawn == [2, 3, 4, 5]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "a.png.tmp").exists()


@pytest.mark.parametrize("runs, what, picture", [
    (["a"], "loss", "a/loss.png"),
    (["mine=a/"], "load", "a/load.png"),
    (["a/metrics.jsonl"], "loss", "a/loss.png"),
    (["b.jsonl"], "loss", "loss.png"),
    (["a", "b.jsonl"], "load", "load.png"),
])
def test_the_picture_of_one_run_lies_beside_its_records(tmp_path, monkeypatch, runs, what, picture):
    """Two that are watched at once share no picture; one that compares them belongs to neither."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("a/metrics.jsonl", "b.jsonl"):
        write(tmp_path / name, STEPS)

    assert plot.default_out([plot.Run(run) for run in runs], what) == picture


@pytest.mark.parametrize("argv, picture", [([], "loss.png"), (["--out=my.svg"], "my.svg")])
def test_where_the_picture_is_is_said(tmp_path, argv, picture):
    pytest.importorskip("matplotlib")
    write(tmp_path / "a.jsonl", [*STEPS, END])

    output = processes.finish("scripts.plot", ["a.jsonl", *argv], folder=tmp_path)

    assert output.endswith(f"wrote {picture}\n") and (tmp_path / picture).exists()


def write_font(path, family, text):
    """A font that has the characters of a text, each as an empty glyph."""
    from fontTools.fontBuilder import FontBuilder                # optional: matplotlib brings it
    from fontTools.ttLib.tables._g_l_y_f import Glyph            # optional: likewise
    names = {ord(char): f"u{ord(char):X}" for char in text}
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", *names.values()])
    font.setupCharacterMap(names)
    font.setupGlyf({name: Glyph() for name in font.font.getGlyphOrder()})
    font.setupHorizontalMetrics({name: (1000, 0) for name in font.font.getGlyphOrder()})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


def test_a_chinese_name_is_shown_where_a_font_has_it(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import font_manager                          # optional
    write_font(tmp_path / "font.ttf", "SimHei", "小说")
    run = plot.Run(f"小说={write(tmp_path / 'a.jsonl', [*STEPS, {'step': 4, 'val_loss': 2.0}])}")

    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)      # "Glyph … missing from font(s) …"
        plot.draw([run], plot.Settings(out=str(tmp_path / "loss.png")))


def test_the_experts_load(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "moe.jsonl", [{"step": 1, "load": [[0.25, 0.75]], "tokens": 10}])
    settings = plot.Settings(what="load", out=str(tmp_path / "load.svg"))

    plot.draw([plot.Run(str(tmp_path / "moe.jsonl"))], settings)

    assert "<svg" in (tmp_path / "load.svg").read_text()


def test_bad_input(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "dense.jsonl", STEPS)
    assert "name a run" in refused("scripts.plot", [])
    assert "cannot read nowhere: No such file" in refused("scripts.plot", ["nowhere"])
    assert "x=weeks must be one of" in refused("scripts.plot", ["a", "--x=weeks"])
    assert "no load" in refused("scripts.plot", ["dense.jsonl", "--what=load"], folder=tmp_path)
