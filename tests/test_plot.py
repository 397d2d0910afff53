"""Loss curves become a picture; mistakes end in one line."""

import functools
import json
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import assert_refused, largest_file

from evaluation import plot
from nanochatgpt.configurator import run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def draw(monkeypatch, tmp_path, in_process):
    """Run plot.py in this process, in an empty folder: draw("--out_dir=a", "--svg=b.svg")."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(in_process, lambda: run(plot.main, plot.Config), "plot.py")


@pytest.fixture
def lines_of(draw, monkeypatch):
    """Return the points of each line of the picture: lines_of("a,b") -> [(iters, losses)]."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))

    def lines_of(out_dirs):
        done = draw(f"--out_dir={out_dirs}")
        assert (done.returncode, done.stderr) == (0, "")
        return [line.get_data() for line in figures.pop().axes[0].lines]

    return lines_of


def write_run(directory, loss=lambda it: 4 + 6 * 0.97**it, iters=100, cut=""):
    """Write the metrics of a run as train.py does: the losses before every 50th step, the loss
    after every 10th."""
    lines = []
    for it in range(0, iters + 1, 10):
        if it:
            step = {"iter": it, "loss": loss(it), "lr": 1e-3, "tokens_per_s": 1e3, "mfu": None}
            lines.append(json.dumps(step))
        if it % 50 == 0:
            losses = {"train_loss": loss(it), "val_loss": loss(it) + 0.125}
            lines.append(json.dumps({"iter": it} | losses))
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n" + cut)


def test_runs_share_a_picture_and_each_has_a_line_of_text(draw, tmp_path):
    write_run(tmp_path / "out" / "a", loss=lambda it: 8 - it / 20)
    write_run(tmp_path / "out" / "$b<i>", loss=lambda it: 5 + abs(it - 50) / 50)
    done = draw("--out_dir=out/a,out/$b<i>", "--svg=new/both.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "out/a: best val loss 3.1250 at iter 100",
        "out/$b<i>: best val loss 5.1250 at iter 50",
        "wrote new/both.svg",
    ]
    root = ElementTree.parse("new/both.svg").getroot()
    texts = {element.text for element in root.iter(SVG + "text")}
    assert {"out/a", "out/$b<i>", "iter", "loss (nats)"} <= texts
    for element in root.iter():  # it loads nothing
        for name, value in element.attrib.items():
            assert not name.endswith("href") or value.startswith("#")


def test_steps_their_mean_and_the_validation_loss_are_drawn(lines_of, tmp_path):
    write_run(tmp_path / "short", loss=lambda it: 8 - it / 20)
    write_run(tmp_path / "long", loss=lambda it: 4 + it % 20 / 10, iters=2000)
    steps, means, val, long_steps, long_means, _ = lines_of("short,long")
    assert np.allclose(steps, (range(10, 101, 10), np.arange(7.5, 2.9, -0.5)))
    assert np.allclose(means, steps)  # a mean of one step each, as long as there are few
    assert np.allclose(val, ([0, 50, 100], [8.125, 5.625, 3.125]))
    assert list(long_means[0]) == list(long_steps[0])[4:]  # a mean of 1 + 200 / 50 steps
    assert long_means[1][7] == pytest.approx(sum(long_steps[1][7:12]) / 5)


def test_a_line_that_a_kill_cut_short_and_null_are_left_out(lines_of, tmp_path):
    write_run(tmp_path / "whole")
    write_run(tmp_path / "cut", cut='{"iter": 110, "loss": null}\n{"iter": 120, "loss": 3.')
    lines = lines_of("whole,cut")
    for whole, cut in zip(lines[:3], lines[3:], strict=True):
        assert np.array_equal(whole, cut)


def test_a_run_that_has_only_begun_is_drawn(draw, tmp_path):
    write_run(tmp_path / "run", iters=0)
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"iter": 1, "lr": 0.1}\n{"it')
    done = draw("--out_dir=run,young")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["run: best val loss 10.1250 at iter 0", "wrote loss.svg"]


def test_mistakes_are_named(draw, tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert_refused(draw("--out_dir=run,nowhere"), "nowhere/metrics.jsonl")
    assert_refused(draw("--out_dir=empty"), "empty/metrics.jsonl")
    assert_refused(draw("--out_dir=run", "--sgv=a.svg"), "svg")
    (tmp_path / "other").mkdir()
    for line in ("[1]", "5", '{"loss": 1}', '{"iter": "1", "loss": 1}', '{"iter": 1, "loss": "a"}'):
        (tmp_path / "other" / "metrics.jsonl").write_text(line + "\n")
        assert_refused(draw("--out_dir=other"), "other/metrics.jsonl", line[-10:])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(draw("--out_dir=run"), "pip install matplotlib")
    assert not list(tmp_path.glob("*.svg*"))


def test_a_picture_that_cannot_be_written_leaves_the_old_one(draw, tmp_path):
    write_run(tmp_path / "run")
    assert_refused(draw("--out_dir=run", "--svg=run"), "run")
    (tmp_path / "loss.svg").write_text("before")
    with largest_file(1000):
        assert_refused(draw("--out_dir=run"), "loss.svg")
    assert (tmp_path / "loss.svg").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.svg", "run"]
