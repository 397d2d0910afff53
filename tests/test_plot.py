"""Loss curves become a PNG, or without matplotlib a plot in the terminal; mistakes end in one line."""

import functools
import json
import math
import struct
import sys

import pytest
from conftest import assert_refused, largest_file

from evaluation import plot


@pytest.fixture
def here(monkeypatch, tmp_path, in_process):
    """Run plot.py in this process, in an empty folder and a terminal of 80 × 24: here("a", "--png=b.png")."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return functools.partial(in_process, plot.main, "plot.py")


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def write_run(directory, loss=lambda it: 4 + 6 * 0.97**it, iters=100, cut=""):
    """Write the metrics of a run as train.py does: the losses before every 50th step, the loss after every 10th."""
    records = []
    for it in range(0, iters + 1, 10):
        if it:
            speeds = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1000.0 + it, "mfu": None}
            records.append({"iter": it, "loss": loss(it), **speeds})
        if it % 50 == 0:
            records.append({"iter": it, "train_loss": loss(it), "val_loss": loss(it) + 0.125})
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + cut
    )


def png_size(path):
    """Return (width, height) in pixels."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB\x60\x82")
    return struct.unpack(">II", data[16:24])


def rows_of(text, glyph):
    """Return {column: row} of a glyph in the plotting area of a terminal plot; rows count from the top."""
    area = [line.split("│", 1)[1] for line in text.splitlines() if "│" in line]
    return {x: y for y, line in enumerate(area) for x, char in enumerate(line) if char == glyph}


def test_a_run_becomes_a_png(here, tmp_path):
    write_run(tmp_path / "run")
    done = here("run")
    assert (done.returncode, done.stderr) == (0, "")
    width, height = png_size(tmp_path / "loss.png")
    assert 800 <= width <= 3000
    assert 500 <= height <= 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "run"]


def test_several_runs_go_into_one_png_and_each_is_summed_up_in_a_line(here, tmp_path):
    write_run(tmp_path / "out" / "a", loss=lambda it: 8 - it / 20)
    write_run(tmp_path / "out" / "b", loss=lambda it: 5 + abs(it - 50) / 50)
    done = here("out/a", "--png=both.png", "out/b")
    assert done.stdout.splitlines() == [
        "wrote both.png",
        "out/a: 100 iters, last loss 3.0000, best val loss 3.1250 at iter 100, 1,055 tokens/s",
        "out/b: 100 iters, last loss 6.0000, best val loss 5.1250 at iter 50, 1,055 tokens/s",
    ]
    png_size(tmp_path / "both.png")


@pytest.mark.parametrize("low, scale", [(5, "linear"), (0.01, "log")])
def test_labels_say_what_is_drawn_and_the_scale_is_logarithmic_over_decades(
    here, tmp_path, monkeypatch, low, scale
):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    write_run(tmp_path / "a", loss=lambda it: low + 5 * 0.9**it)
    write_run(tmp_path / "b", loss=lambda it: low + 5 * 0.8**it)
    here("a", "b")
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == (
        "iter",
        "loss (nats)",
        scale,
    )
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    mean, loss, val_loss = axes.lines[:3]
    assert list(mean.get_ydata()) == pytest.approx(
        list(loss.get_ydata())
    )  # of one each where there are few
    assert (len(loss.get_xdata()), loss.get_marker()) == (10, "None")
    assert (list(val_loss.get_xdata()), val_loss.get_marker()) == ([0, 50, 100], "o")
    assert loss.get_color() == val_loss.get_color() == mean.get_color() != axes.lines[3].get_color()
    write_run(tmp_path / "long", iters=2000)
    here("long")
    mean, loss = drawn[1].axes[0].lines[:2]
    assert list(mean.get_xdata()) == list(loss.get_xdata())[4:]
    assert mean.get_ydata()[7] == pytest.approx(sum(loss.get_ydata()[7:12]) / 5)


def test_a_line_that_a_kill_cut_short_is_left_out(here, tmp_path):
    write_run(tmp_path / "whole")
    write_run(tmp_path / "cut", cut='{"iter": 110, "loss": 3.')
    whole, cut = here("whole", "cut").stdout.splitlines()[1:]
    assert cut == whole.replace("whole", "cut")


def test_a_run_that_diverged_is_drawn_up_to_there(here, tmp_path, monkeypatch):
    write_run(tmp_path / "run", iters=90, cut='{"iter": 100, "loss": NaN}\n')
    assert "last loss nan" in here("run").stdout
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert max(rows_of(here("run").stdout, "·")) == round(90 / 100 * 69)


@pytest.mark.parametrize("low", [5, 0.01])
def test_without_matplotlib_falling_losses_fall_in_the_terminal(here, tmp_path, no_matplotlib, low):
    write_run(tmp_path / "run", loss=lambda it: low + 5 * 0.95**it)
    done = here("run")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "loss.png").exists()
    rows, dots = rows_of(done.stdout, "·"), rows_of(done.stdout, "●")
    assert list(dots.values()) == sorted(dots.values())
    assert dots[0] == 0  # the highest loss, before the first step
    assert dots.keys() == {0, round(69 / 2), 69}
    falling = [rows[x] for x in sorted(rows)]
    assert falling == sorted(falling)
    assert falling[0] < 10 < falling[-1]
    assert [line for line in done.stdout.splitlines() if "pip install matplotlib" in line] == [
        "for a PNG: pip install matplotlib"
    ]
    assert sum(math.ceil(len(line) / 80) for line in done.stdout.splitlines()) < 24
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[:-1])


def test_in_the_terminal_each_run_has_its_own_glyphs(here, tmp_path, no_matplotlib):
    for i in range(3):
        write_run(
            tmp_path / f"run{i}",
            loss=lambda it, i=i: 2 + i + math.exp(-it / 50),
            iters=50 * (i + 1),
        )
    text = here("run0", "run1", "run2").stdout
    assert "· loss, ● val_loss: run0\n+ loss, ■ val_loss: run1\n× loss, ◆ val_loss: run2\n" in text
    ends = [max(rows_of(text, glyph)) for glyph in "●■◆"]
    assert ends == [round(69 / 3), round(69 * 2 / 3), 69]
    assert rows_of(text, "·")[10] > rows_of(text, "+")[10] > rows_of(text, "×")[10]


@pytest.mark.parametrize("blocked", [False, True])
def test_a_run_that_has_only_begun_is_drawn(here, tmp_path, monkeypatch, blocked):
    if blocked:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_run(tmp_path / "run", iters=0)
    done = here("run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "run: 0 iters, best val loss 10.1250 at iter 0"


def test_without_a_terminal_it_draws_too_and_does_not_wait_for_torch(script, tmp_path):
    write_run(tmp_path / "run")
    blocker = tmp_path / "blocked" / "matplotlib.py"
    blocker.parent.mkdir()
    blocker.write_text("raise ModuleNotFoundError")
    (blocker.parent / "torch.py").write_text("raise AssertionError")
    done = script(
        "plot.py", "run", env={"PYTHONPATH": str(blocker.parent), "PYTHONIOENCODING": "utf-8"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "●" in done.stdout


def assert_refused_in_a_line(done, *words):
    assert_refused(done, *words)
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_mistakes_are_named(here, tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"iter": 1, "lr": 0.1}\n{"it')
    assert_refused_in_a_line(here(), "no OUT_DIR", "python plot.py")
    assert_refused_in_a_line(here("--png=a.png"), "no OUT_DIR")
    assert_refused_in_a_line(here("run", "nowhere"), "nowhere does not exist", "train.py")
    assert_refused_in_a_line(here("empty"), "empty/metrics.jsonl does not exist", "train.py")
    assert_refused_in_a_line(here("young"), "young/metrics.jsonl has no losses")
    assert_refused_in_a_line(here("run", "--pgn=a.png"), "png")
    (tmp_path / "other").mkdir()
    for line in (
        "[1]",
        "5",
        "null",
        '{"loss": 1}',
        '{"iter": "1", "loss": 1}',
        '{"iter": 1, "loss": "low"}',
    ):
        (tmp_path / "other" / "metrics.jsonl").write_text(line + "\n")
        assert_refused_in_a_line(
            here("other"), "other/metrics.jsonl is not the log of a run", line[-10:]
        )
    assert not list(tmp_path.glob("*.png*"))


def test_a_png_that_cannot_be_written_is_named_and_leaves_what_was_there(here, tmp_path):
    write_run(tmp_path / "run")
    assert_refused_in_a_line(here("run", "--png=nowhere/loss.png"), "nowhere/loss.png")
    assert_refused_in_a_line(here("run", "--png=run"), "run")
    (tmp_path / "loss.png").write_text("before")
    with largest_file(1000):
        assert_refused_in_a_line(here("run"), "loss.png")
    assert (tmp_path / "loss.png").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "run"]
