"""Loss curves become an SVG picture; mistakes end in one line."""

import functools
import json
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import assert_refused, largest_file

from evaluation import plot
from evaluation.charts import GRAY

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def draw(monkeypatch, tmp_path, in_process):
    """Run plot.py in this process, in an empty folder: draw("a", "--svg=b.svg")."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(in_process, plot.main, "plot.py")


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


def read_svg(path):
    """Return (curves {color: [[(x, y)]]}, dots {color: [(x, y)]}, texts) of a picture."""
    curves, dots, texts = {}, {}, []
    for element in ElementTree.parse(path).getroot():
        if element.tag == SVG + "polyline" and element.get("stroke") != GRAY:
            points = [tuple(map(float, p.split(","))) for p in element.get("points").split()]
            curves.setdefault(element.get("stroke"), []).append(points)
        elif element.tag == SVG + "circle":
            point = (float(element.get("cx")), float(element.get("cy")))
            dots.setdefault(element.get("fill"), []).append(point)
        elif element.tag == SVG + "text":
            texts.append(element.text)
    return curves, dots, texts


def test_runs_share_a_picture_and_each_has_a_line_of_text(draw, tmp_path):
    write_run(tmp_path / "out" / "a", loss=lambda it: 8 - it / 20)
    write_run(tmp_path / "out" / "b", loss=lambda it: 5 + abs(it - 50) / 50)
    done = draw("out/a", "--svg=new/both.svg", "out/b")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "wrote new/both.svg",
        "out/a: 100 iters, last loss 3.0000, best val loss 3.1250 at iter 100",
        "out/b: 100 iters, last loss 6.0000, best val loss 5.1250 at iter 50",
    ]
    curves, dots, texts = read_svg("new/both.svg")
    assert len(curves) == 2 and curves.keys() == dots.keys()
    assert {"● out/a", "● out/b", "iter", "loss (nats)"} <= set(texts)
    (steps, means), (other, _) = curves.values()
    assert steps == means and len(steps) == 10  # a mean of one step each, as long as there are few

    # a's loss falls in a straight line; y grows downward; 3 is the lowest of all losses
    (x1, y1), (x2, y2), *_, (x, y) = steps
    assert y2 > y1 and (y - y1) / (x - x1) == pytest.approx((y2 - y1) / (x2 - x1), abs=0.01)
    assert max(y for _, y in steps) > max(y for _, y in other)
    first, middle, last = next(iter(dots.values()))
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert last[0] == steps[-1][0]


def test_many_steps_are_smoothed(draw, tmp_path):
    write_run(tmp_path / "long", loss=lambda it: 4 + it % 20 / 10, iters=2000)
    draw("long")
    steps, means = next(iter(read_svg("loss.svg")[0].values()))
    assert [x for x, _ in means] == [x for x, _ in steps][4:]  # a mean of 1 + 200 / 50 steps
    assert means[7][1] == pytest.approx(sum(y for _, y in steps[7:12]) / 5, abs=0.1)


def test_a_line_that_a_kill_cut_short_and_nan_are_left_out(draw, tmp_path):
    write_run(tmp_path / "whole")
    write_run(tmp_path / "cut", cut='{"iter": 110, "loss": NaN}\n{"iter": 120, "loss": 3.')
    whole, cut = draw("whole", "cut").stdout.splitlines()[1:]
    assert cut == whole.replace("whole", "cut")


def test_a_run_that_has_only_begun_is_drawn(draw, tmp_path):
    write_run(tmp_path / "run", iters=0)
    done = draw("run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "run: 0 iters, best val loss 10.1250 at iter 0"


def test_mistakes_are_named(draw, tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"iter": 1, "lr": 0.1}\n{"it')
    assert_refused(draw(), "evaluation/plot.py")
    assert_refused(draw("run", "nowhere"), "nowhere", "train.py")
    assert_refused(draw("empty"), "empty/metrics.jsonl", "train.py")
    assert_refused(draw("young"), "young/metrics.jsonl", "no losses")
    assert_refused(draw("run", "--sgv=a.svg"), "svg")
    (tmp_path / "other").mkdir()
    for line in ("[1]", "5", '{"loss": 1}', '{"iter": "1", "loss": 1}', '{"iter": 1, "loss": "a"}'):
        (tmp_path / "other" / "metrics.jsonl").write_text(line + "\n")
        assert_refused(draw("other"), "other/metrics.jsonl", line[-10:])
    assert not list(tmp_path.glob("*.svg*"))


def test_a_picture_that_cannot_be_written_leaves_the_old_one(draw, tmp_path):
    write_run(tmp_path / "run")
    assert_refused(draw("run", "--svg=run"), "run")
    (tmp_path / "loss.svg").write_text("before")
    with largest_file(1000):
        assert_refused(draw("run"), "loss.svg")
    assert (tmp_path / "loss.svg").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.svg", "run"]
