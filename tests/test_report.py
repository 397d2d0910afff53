"""The page of an evaluation: what it shows, that it loads nothing, and that no text of a model
becomes HTML."""

import json
from html.parser import HTMLParser

import pytest
import torch

import evaluate
from evaluation.charts import GRAY
from evaluation.report import page
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.configurator import run
from nanochatgpt.tokenizer import Tokenizer

EVIL = '<script>alert("x")</script>'
RUN = {"loss": {10: 4.0, 20: 3.0}, "val_loss": {0: 5.0, 30: 2.5}}


class Parsed(HTMLParser):
    """The tags of a page, [(name, attributes)], and its text; checks that every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)
        assert self.open in ([], ["html"])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def curves(self):
        """Return the curves of all charts, [[(x, y) in pixels]], without the grid."""
        lines = [line["points"] for line in self.named("polyline") if line["stroke"] != GRAY]
        return [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]


@pytest.fixture
def example():
    rows = [["", "a", EVIL], ["loss", "1.0", "2.0"]]
    talks = [([{"role": "user", "content": EVIL}], {"a": EVIL, EVIL: "b & c"})]
    return page("a and b", rows, {"a": RUN}, {"a": [1, 2, 3, 40], EVIL: [5]}, talks)


def test_text_stays_text_and_nothing_is_loaded(example):
    parsed = Parsed(example)
    assert EVIL not in example and parsed.text.count(EVIL) == 5 and "b & c" in parsed.text
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert not any({"src", "href"} & attrs.keys() for _, attrs in parsed.tags)
    assert "url(" not in example and "@import" not in example


def test_the_points_of_a_run_are_where_they_belong(example):
    parsed = Parsed(example)
    steps, means = parsed.curves()[:2]
    (x1, y1), (x2, y2) = steps
    first, last = ((float(dot["cx"]), float(dot["cy"])) for dot in parsed.named("circle"))
    assert steps == means  # a mean of one step each, as long as there are few
    assert first[0] < x1 < x2 < last[0]
    assert first[1] < y1 < y2 < last[1]  # the loss falls, and y grows downward


def test_the_curve_of_lengths_is_the_share_of_each_bin(example):
    # of the four replies of a, two are in the first bin of three tokens, one each in two others
    a, other = Parsed(example).curves()[2:]
    bottom = max(y for _, y in a)
    heights = [bottom - y for _, y in a if y < bottom]
    (highest,) = (bottom - y for _, y in other if y < bottom)
    assert [height / highest for height in heights] == pytest.approx([0.5, 0.25, 0.25], abs=0.01)


def test_evaluate_writes_it(in_process, tmp_path, data_dir):
    torch.manual_seed(0)
    for name in ("a", "b"):
        model = GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32))
        save_model(model, Tokenizer(), tmp_path / name)
    (tmp_path / "a" / "metrics.jsonl").write_text(json.dumps({"iter": 1, "loss": 3.0}) + "\n")
    models = [f"--init_from={tmp_path / 'a'}", f"--base={tmp_path / 'b'}", "--max_new_tokens=16"]
    data = [f"--data_dir={data_dir}", "--dataset=talk", "--probes=0"]
    report = tmp_path / "new" / "report.html"
    main = lambda: run(evaluate.main, evaluate.Config)  # noqa: E731
    done = in_process(main, "evaluate.py", *models, *data, f"--report={report}")
    assert done.returncode == 0, done.stderr
    parsed = Parsed(report.read_text())
    assert len(parsed.curves()) == 2 + 3  # a's steps and means; lengths of a, b and people
    talks = [attrs for attrs in parsed.named("div") if attrs.get("class") == "talk"]
    replies = [attrs for attrs in parsed.named("div") if attrs.get("class") == "reply"]
    assert len(talks) == 10 and len(replies) == 3 * len(talks)  # of a, b and people
    for row in done.stdout.splitlines()[1:3]:
        assert row.split()[-1] in parsed.text


@pytest.mark.parametrize("runs", [{}, {"a": RUN}])
def test_missing_parts_are_left_out(runs):
    html = page("a", [["", "a"], ["loss", "1"]], runs, {}, [])
    assert ("polyline" in html) == bool(runs) and "Replies" not in html
