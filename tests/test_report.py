"""The page of an evaluation: what it shows, that it fetches nothing, and that no text of a model becomes HTML."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from conftest import assert_refused

import evaluate
from evaluation.report import page
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.configurator import run
from nanochatgpt.tokenizer import Tokenizer

EVIL = '<script>alert("x")</script>'
RUN = {
    "loss": {10: 4.0, 20: 3.0, 30: float("nan")},
    "val_loss": {0: 5.0, 30: 2.5},
    "tokens_per_s": {},
}


class Parsed(HTMLParser):
    """The tags of a page, [(name, attributes)], and its text; checks that every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)
        assert not self.open

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


def example():
    rows = [["", "a", EVIL], ["loss", "1.0", "2.0"]]
    talks = [([{"role": "user", "content": EVIL}], {"a": EVIL, EVIL: "b & c"})]
    return page("a and b", rows, {"a": RUN}, {"a": [1, 2, 3, 40], EVIL: [5]}, talks)


def test_text_stays_text_and_nothing_is_fetched():
    html = example()
    parsed = Parsed(html)
    assert EVIL not in html and parsed.text.count(EVIL) == 5 and "b & c" in parsed.text
    assert not parsed.named("script") and not parsed.named("link") and not parsed.named("img")
    assert not re.search(r"https?://|url\(|@import", html)


def test_points_of_a_run_are_drawn_where_they_belong():
    parsed = Parsed(example())
    (line,) = parsed.named("polyline")
    (x1, y1), (x2, y2) = (
        map(float, point.split(",")) for point in line["points"].split()
    )  # NaN is left out
    dots = [(float(dot["cx"]), float(dot["cy"])) for dot in parsed.named("circle")]
    assert x1 < x2 and y1 < y2  # falls, and y grows downward
    assert dots[0][0] < x1 and dots[1][0] > x2 and dots[0][1] < y1 and dots[1][1] > y2


def test_bars_are_as_high_as_the_shares():
    # of the four replies of a two are in the first bin of three tokens and one in the second; the other has one reply
    heights = [float(bar["height"]) for bar in Parsed(example()).named("rect")]
    a, other = heights[:20], heights[20:]
    assert [round(h / max(other), 2) for h in a if h] == [0.5, 0.25, 0.25] and sum(
        h > 0 for h in other
    ) == 1


def test_evaluate_writes_it(in_process, tmp_path, data_dir):
    torch.manual_seed(0)
    for name in ("a", "b"):
        save_model(
            GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32)),
            Tokenizer(),
            tmp_path / name,
        )
    (tmp_path / "a" / "metrics.jsonl").write_text(json.dumps({"iter": 1, "loss": 3.0}) + "\n")

    def call(**knobs):
        knobs = {
            "init_from": tmp_path / "a",
            "base": tmp_path / "b",
            "data_dir": data_dir,
            "dataset": "talk",
        } | knobs
        knobs |= {"probes": 0, "max_new_tokens": 16}
        arguments = [f"--{name}={value}" for name, value in knobs.items()]
        return in_process(lambda: run(evaluate.main, evaluate.Config), "evaluate.py", *arguments)

    done = call(report=tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    parsed = Parsed((tmp_path / "report.html").read_text())
    assert len(parsed.named("polyline")) == 1 and len(parsed.named("rect")) == 3 * 20
    talks = [attrs for attrs in parsed.named("div") if attrs.get("class") == "talk"]
    replies = [attrs for attrs in parsed.named("div") if attrs.get("class") == "reply"]
    assert len(talks) == 10 and len(replies) == 3 * len(talks)  # of a, b and people
    for row in done.stdout.splitlines()[1:3]:
        assert row.split()[-1] in parsed.text
    assert_refused(call(report=tmp_path / "no" / "r.html"), "report=", "no such folder")


@pytest.mark.parametrize("runs", [{}, {"a": RUN}])
def test_what_there_is_not_is_left_out(runs):
    html = page("a", [["", "a"], ["loss", "1"]], runs, {}, [])
    assert ("polyline" in html) == bool(runs) and "What is said" not in html
