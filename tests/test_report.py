"""The page of an evaluation: what it shows, that it loads nothing, and that no text of a model
becomes HTML."""

import json
import math
from html.parser import HTMLParser

import torch

import evaluate
from evaluation.report import page, write_json
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.configurator import run
from nanochatgpt.tokenizer import Tokenizer

EVIL = '<script>alert("x")</script>'


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

    def handle_data(self, data):
        self.text += data


def test_text_stays_text_and_nothing_is_loaded():
    tokenizer = Tokenizer()
    prompt, _ = tokenizer.render([{"role": "user", "content": EVIL}], add_generation_prompt=True)
    html = page(EVIL, f"loss {EVIL}", {"a": [EVIL], EVIL: ["b & c"]}, [prompt], tokenizer)
    parsed = Parsed(html)
    # in both titles, the table, the conversation, a reply and a name
    assert EVIL not in html and parsed.text.count(EVIL) == 6 and "b & c" in parsed.text
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert not any({"src", "href"} & attrs.keys() for _, attrs in parsed.tags)
    assert "url(" not in html and "@import" not in html


def test_evaluate_writes_it(in_process, tmp_path, data_dir):
    torch.manual_seed(0)
    for name in ("a", "b"):
        model = GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32))
        save_model(model, Tokenizer(), tmp_path / name)
    models = [f"--init_from={tmp_path / 'a'}", f"--base={tmp_path / 'b'}", "--max_new_tokens=16"]
    data = [f"--data_dir={data_dir}", "--dataset=talk", "--probes=0"]
    report = tmp_path / "new" / "report.html"
    main = lambda: run(evaluate.main, evaluate.Config)  # noqa: E731
    done = in_process(main, "evaluate.py", *models, *data, f"--report={report}")
    assert done.returncode == 0, done.stderr
    parsed = Parsed(report.read_text())
    assert sum(attrs.get("class") == "talk" for _, attrs in parsed.tags) == 10
    for name in (tmp_path / "a", tmp_path / "b", "people"):
        assert parsed.text.count(f"{name}\n") >= 10
    for row in done.stdout.splitlines()[1:3]:
        assert row in parsed.text


def test_an_evaluation_without_prompts_has_no_conversations():
    assert '<div class="talk">' not in page("a", "loss 1", {"a": []}, [], Tokenizer())


def test_json_has_null_for_nan_and_infinity(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": {"loss": math.nan, "perplexity": math.inf}})
    text = (tmp_path / "new" / "a.json").read_text()
    assert json.loads(text, parse_constant=None) == {"a": {"loss": None, "perplexity": None}}
