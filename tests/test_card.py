"""The model card of a training run: read by huggingface_hub, compared with the run, free of what is
personal, and left alone once somebody has edited it."""

import ast
import getpass
import json
import re
import shutil
import signal
import socket
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from conftest import ROOT, records, small_talk, write_jsonl, write_shards
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers import AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY

import train
from model import GPT, GPTConfig
from nanochatgpt import card, configurator
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.loader import Loader
from nanochatgpt.sampling import ChatSampling
from nanochatgpt.shards import find_shards
from nanochatgpt.tokenizer import Tokenizer
from prepare import chitchat, columned_chat, eli5, jsonl, personachat, recall, spc

KNOBS = {"block_size": 32, "batch_size": 2, "gradient_accumulation_steps": 2, "dropout": 0.25}
KNOBS |= {"max_iters": 4, "eval_interval": 2, "eval_iters": 1, "warmup_iters": 1, "log_interval": 1}
KNOBS |= {"learning_rate": 0.01, "device": "cpu", "dtype": "float32"}
NOTES = {
    "talk": {"name": "Small | talk", "hub": "some-org/small_talk", "licence": "CC BY 4.0"},
    "tea": {"name": "Tea", "url": "https://example.org/tea", "hub": "some-org/tea"},
}
TINY = GPTConfig(32, 50257, 2, 2, 16)
SECRET = "zanzibar"  # a folder above everything


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model to start from, whose card names a base model, and three data sets, one
    of them without a note of its origin."""
    folder = tmp_path_factory.mktemp(SECRET) / SECRET
    torch.manual_seed(0)
    save_model(GPT(TINY), Tokenizer(), folder / "start")
    front = "---\nlicense: mit\nbase_model:\n- openai-community/gpt2\ndatasets:\n- old/data\n---\n"
    (folder / "start" / "README.md").write_text(front + "# start\n")
    for name, note in NOTES.items():
        write_shards(folder / "data" / name, small_talk(40, seed=1), small_talk(8, seed=2))
        (folder / "data" / name / "source.json").write_text(json.dumps(note | {"language": "en"}))
    (folder / "data" / "raw").mkdir()
    for split in ("train", "val"):  # nanoGPT's format: tokens and nothing else
        tokens = np.arange(1000, 2000, dtype="<u2")
        tokens.tofile(folder / "data" / "raw" / f"{split}.bin")
    return folder


@pytest.fixture(scope="module")
def out(folder):
    """The out_dir of a run with absolute paths."""
    dataset = f"talk:0.5, tea,{folder / 'data' / 'raw'}:2"
    fit(folder, init_from=str(folder / "start"), dataset=dataset)
    return folder / "my-chat"


def config_of(folder, **knobs):
    paths = {"out_dir": str(folder / "my-chat"), "data_dir": str(folder / "data")}
    return train.Config(**KNOBS | paths | knobs)


def fit(folder, **knobs):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.main(config_of(folder, **knobs))
    for number, handler in handlers.items():  # a run replaces them
        signal.signal(number, handler)


def write(out_dir, init_from, losses=(4.0,), read=True, **knobs):
    """Write the card of an imagined run; return it as huggingface_hub reads it."""
    knobs = {"dataset": "talk"} | knobs
    config = config_of(out_dir.parent, out_dir=str(out_dir), init_from=init_from, **knobs)
    out_dir.mkdir(exist_ok=True)
    with open(out_dir / "metrics.jsonl", "w") as log:
        for i, loss in enumerate(losses):
            print(json.dumps({"iter": i, "train_loss": 3.0, "val_loss": loss}), file=log)
    tokenizer = Tokenizer(config.template or "human_bot")
    shards = find_shards(config.data_dir, config.dataset, "train", shares=True)
    loader = Loader(shards, config.batch_size, config.block_size, config.seed, tokenizer)
    card.write_card(config, GPT(TINY), tokenizer, loader, len(losses) - 1, min(losses))
    return ModelCard.load(out_dir / "README.md") if read else None


@pytest.fixture
def home(folder, tmp_path):
    """A folder of its own with the data of `folder`."""
    shutil.copytree(folder / "data", tmp_path / "data")
    return tmp_path


def tables(text):
    """Return the tables of a Markdown text, [[cell]] without the line below the head."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    split = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in b.splitlines()] for b in blocks]
    for table in split:
        assert len({len(row) for row in table}) == 1 and set("".join(table[1])) == {"-"}
    return [[[cell.strip() for cell in row] for row in [t[0], *t[2:]]] for t in split]


def code(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# --- metadata -------------------------------------------------------------------------------------


def test_the_hub_reads_the_metadata(out):
    data = ModelCard.load(out / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation" in PIPELINE_REGISTRY.get_supported_tasks()
    assert data.base_model == "openai-community/gpt2"  # that of the directory it started from
    assert data.datasets == ["old/data", "some-org/small_talk", "some-org/tea"]
    for repo in (data.base_model, *data.datasets):
        validate_repo_id(repo)
    assert data.license is None  # the user's to choose
    assert data.language is None  # nobody knows that of the third data set
    assert data.tags and all(isinstance(tag, str) for tag in data.tags)


@pytest.mark.parametrize(
    ("init_from", "base"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("some-org/some-model", "some-org/some-model"),
        ("nano", None),
        ("scratch", None),
        ("resume", None),  # of a run whose card is lost
        ("out/other", None),
    ],
)
def test_the_base_model_is_what_init_from_means_on_the_hub(home, init_from, base, monkeypatch):
    monkeypatch.chdir(home)
    written = write(home / "chat", init_from)
    assert written.data.base_model == base
    assert written.data.language == ["en"]
    assert (f"https://huggingface.co/{base}" in written.text) == bool(base)


@pytest.mark.parametrize(
    ("front", "base"),
    [
        ("base_model: a-b/c.d", "a-b/c.d"),
        ("base_model: 'gpt2'", "gpt2"),
        ("tags: [x]\nbase_model: [a/b, c/d]\n", ["a/b", "c/d"]),
        ("base_model:\n  - a/b\n  - c/d\nlicense: mit", ["a/b", "c/d"]),
        ("base_model: /home/alice/models/x", None),
        ("base_model: ~/x", None),
        ("base_model:", None),
        ("datasets:\n- a/b", None),
    ],
)
def test_a_directory_passes_on_the_base_models_of_its_own_card(home, front, base):
    start = home / "start"
    start.mkdir()
    (start / "README.md").write_text(f"---\n{front}\n---\n\nbase_model: e/f\n")
    assert write(home / "chat", str(start)).data.base_model == base


# --- what it says ---------------------------------------------------------------------------------


def test_the_curve_is_that_of_the_log(out):
    _, curve = tables((out / "README.md").read_text())
    logged = [record for record in records(out) if "val_loss" in record]
    assert [record["iter"] for record in logged] == [0, 2, 4]
    expected = [[r["iter"], round(r["train_loss"], 4), round(r["val_loss"], 4)] for r in logged]
    assert curve[0] == ["iter", "train", "val"]
    assert [[int(it), float(x), float(y)] for it, x, y in curve[1:]] == expected
    [sentence] = re.findall(r"## Loss\n([^|]*)", (out / "README.md").read_text())
    best, last = re.findall(r"\d+\.\d{4}", sentence)
    assert [float(best), float(last)] == [min(row[2] for row in expected), expected[-1][2]]


@pytest.mark.parametrize("n", [1, 2, 11, 12, 13, 500])
def test_a_long_curve_keeps_its_ends_and_its_best_row(home, n):
    losses = [5 + 0.001 * i for i in range(n)]
    best = n // 3
    losses[best] = 2.5
    text = write(home / "chat", "gpt2", losses).text
    iters = [int(row[0]) for row in tables(text)[1][1:]]
    assert iters == sorted(set(iters)) and {0, best, n - 1} <= set(iters)
    assert min(n, 11) <= len(iters) <= 12


def test_the_data_come_with_licence_link_share_and_epochs(out, folder):
    data, _ = tables((out / "README.md").read_text())
    rows = {row[0]: row[1:] for row in data[1:]}
    assert list(rows) == [r"Small \| talk", "[Tea](https://example.org/tea)", "raw"]
    assert [row[0] for row in rows.values()] == ["CC BY 4.0", "not stated", "not stated"]
    # rows of 32 tokens: how many there are, and how many come in an epoch
    counts = [
        Loader([(folder / "data" / name / "train.bin", 1)], 2, 32, 1337, Tokenizer()).n_rows
        for name in ("talk", "tea", "raw")
    ]
    per_epoch = [round(n * share) for n, share in zip(counts, (0.5, 1, 2), strict=True)]
    shares = [float(row[1].rstrip("%")) / 100 for row in rows.values()]
    assert shares == pytest.approx([n / sum(per_epoch) for n in per_epoch], abs=0.001)
    seen = [4 * 4 * share / n for n, share in zip(counts, shares, strict=True)]  # 4 steps of 4 rows
    assert [float(row[2]) for row in rows.values()] == pytest.approx(seen, rel=0.02)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"dataset": "talk:0.5,tea", "template": "human_bot", "seed": 7, "lr_schedule": "linear"},
        {"max_epochs": 0.5, "gradient_checkpointing": True, "min_lr": 1e-6, "wandb_log": True},
    ],
)
def test_the_recipe_gives_the_same_knobs(home, knobs):
    text = write(home / "chat", "gpt2", **knobs).text
    (home / "recipe.py").write_text(code(text, "python")[1])
    config = configurator.parse(train.Config, [str(home / "recipe.py")])
    for name in ("out_dir", "data_dir", "device", "wandb_log"):  # where it ran
        setattr(config, name, getattr(train.Config, name))
    expected = config_of(home, **{"dataset": "talk"} | knobs)
    for name in ("out_dir", "data_dir", "device", "wandb_log", "given"):
        setattr(expected, name, getattr(config, name))
    assert config == expected
    assert "beta2" not in config.given  # a default


def test_its_sampling_is_that_of_chat_py_and_of_generation_config(out, home):
    generation = json.loads((out / "generation_config.json").read_text())
    defaults = ChatSampling()
    for name in ("temperature", "top_k", "top_p"):
        assert generation[name] == getattr(defaults, name)
        assert f"{name} {generation[name]}" in (out / "README.md").read_text()
    assert generation["do_sample"] is True
    write_shards(home / "data" / "talk", small_talk(9), small_talk(3), "user_assistant")
    text = write(home / "chat", "gpt2", template="user_assistant").text
    assert "top_k 35" in text and "<|USER|>" in text  # the template's own


def test_nothing_in_the_folder_is_personal(out):
    names = [SECRET, getpass.getuser(), socket.gethostname(), str(Path.home())]
    personal = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names)
    for path in out.iterdir():
        if path.suffix in (".json", ".jsonl", ".jinja", ".md") and path.name != "tokenizer.json":
            assert not re.search(personal, path.read_text(), re.IGNORECASE), path.name
    text = (out / "README.md").read_text()
    assert "init_from = 'start'\ndataset = 'talk:0.5,tea,raw:2'\n" in text
    assert "# my-chat" in text.splitlines()


# --- the folder as a whole ------------------------------------------------------------------------


def test_the_folder_loads_here_and_in_transformers_as_the_card_says(out, capsys):
    ours, _ = load_model(str(out))
    theirs = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(1000, 1020)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids)[0], theirs(ids).logits, atol=1e-4, rtol=0)
    snippet = code((out / "README.md").read_text(), "python")[0]
    snippet = snippet.replace("USER/my-chat", str(out)).replace("=50", "=3")
    ast.parse(snippet)
    capsys.readouterr()
    exec(snippet, {})
    assert capsys.readouterr().out


def test_a_resumed_run_keeps_its_start_and_the_curve_of_the_whole(folder, out, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(out, again)
    before = ModelCard.load(again / "README.md")
    fit(folder, init_from="resume", out_dir=str(again), max_iters=6, dataset="talk,tea")
    after = ModelCard.load(again / "README.md")
    assert after.data.base_model == before.data.base_model
    assert set(after.data.datasets) == set(before.data.datasets)
    assert "init_from = 'start'\n" in after.text
    assert [row[0] for row in tables(after.text)[1]] == ["iter", "0", "2", "4", "6"]


@pytest.mark.parametrize("edit", ["license: mit\n", "", None], ids=["licence", "mark", "CRLF only"])
def test_an_edited_card_is_never_overwritten(home, edit):
    write(home / "chat", "gpt2")
    path = home / "chat" / "README.md"
    lines = path.read_text().splitlines(keepends=True)
    if edit is None:  # git may change the ends of lines
        path.write_text("".join(lines), newline="\r\n")
    else:
        assert lines[1].startswith("# written by train.py")
        lines[1] = lines[1] * bool(edit) + edit
        path.write_text("".join(lines))
    edited = path.read_bytes()
    write(home / "chat", "gpt2", losses=[4.0, 1.25])
    assert (path.read_bytes() == edited) == (edit is not None)


@pytest.mark.parametrize("notes", [b"mine\n", b"\xff", b"---\nlicense: mit\n---\n", b"---\n# a\n"])
def test_a_readme_that_was_there_before_is_left_alone(home, notes):
    (home / "chat").mkdir()
    (home / "chat" / "README.md").write_bytes(notes)
    write(home / "chat", "gpt2", read=False)
    assert (home / "chat" / "README.md").read_bytes() == notes


def test_a_damaged_note_is_an_error_that_names_it(home):
    (home / "data" / "talk" / "source.json").write_text("{")
    with pytest.raises(ValueError, match=r"talk/source\.json"):
        write(home / "chat", "gpt2")


# --- where it goes --------------------------------------------------------------------------------


def test_the_upload_in_the_docs_leaves_out_the_state_of_the_run(out):
    docs = (ROOT / "docs" / "using.md").read_text()
    [command] = re.findall(r"^hf upload .*", docs, re.MULTILINE)
    excluded = re.findall(r'--exclude "?([^"\s]+)', command)
    (out / "wandb_id").write_text("1a2b3c")
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    assert "last/state.pt" in files
    uploaded = set(filter_repo_objects(files, ignore_patterns=excluded))
    assert {"README.md", "model.safetensors", "metrics.jsonl", "chat_template.jinja"} <= uploaded
    assert not [name for name in uploaded if name.startswith("last") or name == "wandb_id"]


# Modelfile's Go template in Jinja; Go itself made the same of it
GO_TO_JINJA = {
    "{{ range $i, $message := .Messages }}{{ if $i }}\n{{ end }}": "{% for m in messages %}"
    "{% if not loop.first %}{{ newline }}{% endif %}",
    'if eq .Role "system" }}': 'if m.role == "system" -%}',
    'else if eq .Role "user" }}': 'elif m.role == "user" -%}',
    "else }}": "else -%}",
    '{{ if ne (slice (print .Content ".") 0 1) " " }} {{ end }}': "{{ space(m.content) }}",
    "{{- end }}\n{{- end }}\n": "{%- endif -%}{% endfor %}{{ newline }}",
    ".Content": "m.content",
    "{{- ": "{%- ",
}


def test_ollamas_template_writes_what_we_render():
    modelfile = (ROOT / "docs" / "Modelfile").read_text()
    [template] = re.findall(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    for go, jinja in GO_TO_JINJA.items():
        assert go in template, go
        template = template.replace(go, jinja)
    environment = jinja2.Environment()
    environment.globals |= {"newline": "\n", "space": lambda s: "" if s[:1] == " " else " "}
    tokenizer = Tokenizer()
    for messages in small_talk(30):
        messages = [*messages, {"role": "user", "content": "what now?"}]
        ids, _ = tokenizer.render(messages, add_generation_prompt=True)
        text = environment.from_string(template).render(messages=messages)
        assert text == tokenizer.decode(ids)
    stops = re.findall(r'PARAMETER stop "(.*)"', modelfile)
    assert set(stops) == {*tokenizer.stop_strings, "<|endoftext|>"}
    options = dict(re.findall(r"PARAMETER (\w+) ([\d.]+)", modelfile))
    for name in ("temperature", "top_k", "top_p", "frequency_penalty"):
        assert float(options[name]) == getattr(ChatSampling(), name)


# --- the notes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [chitchat, columned_chat, eli5, personachat, recall, spc])
def test_a_corpus_says_where_it_is_from(script):
    origin = script.ORIGIN
    assert {"name", "licence"} <= origin.keys() <= {"name", "hub", "url", "licence", "language"}
    assert all(isinstance(text, str) for text in origin.values())
    if "hub" in origin:
        validate_repo_id(origin["hub"])


def test_prepare_leaves_a_note_and_private_data_none(tmp_path, monkeypatch, in_process):
    monkeypatch.chdir(tmp_path)

    def prepare(script, *args):
        done = in_process(lambda: configurator.run(script.main, script.Config), "x.py", *args)
        assert done.returncode == 0, done.stderr

    prepare(recall, "--conversations=40", "--out_dir=data/x")
    assert json.loads(Path("data/x/source.json").read_text()) == recall.ORIGIN
    source = write_jsonl(tmp_path / "mine.jsonl", small_talk(5))
    prepare(jsonl, f"--source={source}", "--out_dir=data/x")
    assert sorted(path.name for path in Path("data/x").iterdir()) == ["train.bin", "val.bin"]
