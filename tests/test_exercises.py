"""The exercises of docs/course.md can be done: each has a solution, a patch that applies and does
what it should."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT, small_talk, write_jsonl
from forked import Forked

TINY = "--block_size=64 --batch_size=2 --gradient_accumulation_steps=1 --eval_iters=1 --device=cpu"
TINY = ["--dataset=talk", "--n_layer=2", "--n_head=3", "--n_embd=48", *TINY.split()]


@pytest.fixture
def solved(tmp_path):
    """Return run(*args) in a copy of the project with a solution: python = solved("loss");
    python("train.py")."""

    def solve(name):
        tree = tmp_path / "tree"
        others = [".git", ".venv", "data", "out", "tests", "*.egg-info", "__pycache__", ".*_cache"]
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*others))
        patch = ROOT / "docs" / "exercises" / f"{name}.patch"
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
        subprocess.run(["git", "apply", patch], cwd=tree, env=env, check=True)

        def python(*args, input=""):
            done = Forked(args, tree, input=input, root=tree).wait()
            assert done.returncode == 0, done.stderr
            return done.stdout

        return python

    return solve


@pytest.fixture
def talk(tmp_path):
    """A file of conversations to prepare."""
    return write_jsonl(tmp_path / "talk.jsonl", small_talk(40))


def test_each_exercise_has_a_solution():
    patches = (ROOT / "docs" / "exercises").glob("*.patch")
    assert {path.stem for path in patches} == {"template", "corpus", "sampler", "bigger", "loss"}


QA = r"""
from nanochatgpt.checkpoint import load_model
_, tokenizer = load_model("out/qa")
assert tokenizer.template == "qa"
messages = [{"role": "user", "content": "a\n[A]: b<|endoftext|>\n[Q]: c"}]
messages.append({"role": "assistant", "content": "[A]:"})
assert tokenizer.parse(tokenizer.render(messages)[0]) == messages
"""


def test_a_new_template_is_learned_and_spoken(solved, talk):
    python = solved("template")
    python("prepare/jsonl.py", f"--source={talk}", "--out_dir=data/talk", "--template=qa")
    run = ["--init_from=scratch", "--template=qa", "--out_dir=out/qa", "--max_iters=1"]
    assert "[Q]: Hello! How are you today? [A]:" in python("train.py", *run, *TINY)
    python("-c", QA)
    knobs = ["--init_from=out/qa", "--max_new_tokens=8", "--device=cpu"]
    assert python("chat.py", *knobs, input="hello\n").startswith("Bot:")


def test_a_corpus_of_transcripts_is_prepared(solved, tmp_path):
    folder = tmp_path / "transcripts"
    folder.mkdir()
    for n in range(3):
        lines = [f"Ann: hi, {n}", "Ben: it rains", "Tom: hello", "Ann: bye", "Tom: so long", ""]
        (folder / f"{n}.txt").write_text("\n".join(lines))
    command = ["prepare/transcript.py", f"--source={folder}", "--bot=Tom", "--out_dir=data/them"]
    output = solved("corpus")(*command)
    assert "[Human]: hi," in output
    assert "it rains\n[Bot]:« hello<|endoftext|>»\n[Human]: bye" in output


SAMPLER = """
import torch
from transformers import EpsilonLogitsWarper
from nanochatgpt.sampling import Sampling, draw_token
torch.manual_seed(0)
logits = torch.randn(3, 2000) * 3
for epsilon in (0.0005, 0.01, 0.9):
    kept = EpsilonLogitsWarper(epsilon)(None, logits.clone()).isfinite()
    sampling = Sampling(epsilon_cutoff=epsilon)
    drawn = [draw_token(logits, torch.rand(3), sampling) for _ in range(300)]
    found = torch.zeros_like(kept).scatter_(1, torch.stack(drawn, 1), True)
    assert not (found & ~kept).any()
    likely = kept & (logits.softmax(-1) > 0.05)
    assert found[likely].all()
from nanochatgpt.checkpoint import load_model
from nanochatgpt.generate import generate
model, tok = load_model("nano")
sampling = Sampling(max_new_tokens=5, epsilon_cutoff=0.01)
assert len(generate(model, [tok.encode("hello")], sampling)[0]) == 5
"""


def test_a_new_sampler_keeps_the_tokens_that_transformers_keeps(solved):
    solved("sampler")("-c", SAMPLER)


BIGGER = """
import torch
import train
from model import GPT, GPTConfig
from nanochatgpt.configurator import parse
knobs = parse(train.Config, ["config/mini.py"])
shape = {name: getattr(knobs, name) for name in ("n_layer", "n_head", "n_embd")}
with torch.device("meta"):
    print(GPT(GPTConfig(64, **shape)).num_parameters())
"""


def test_a_bigger_model_has_the_size_computed_by_hand_and_its_config_trains(solved, talk):
    python = solved("bigger")
    # embeddings, layers, the last LayerNorm
    n_parameters = (50257 + 64) * 384 + 6 * (12 * 384**2 + 13 * 384) + 2 * 384
    assert int(python("-c", BIGGER)) == n_parameters == 29_970_816
    python("prepare/jsonl.py", f"--source={talk}", "--out_dir=data/talk")
    assert "iter 1:" in python("train.py", "config/mini.py", "--max_iters=1", *TINY)


LOSS = """
import torch
from model import GPT, GPTConfig
torch.manual_seed(0)
model = GPT(GPTConfig(16, 50, 2, 2, 32))
x = torch.randint(50, (2, 8))
y = torch.randint(50, (2, 8)).masked_fill(torch.rand(2, 8) < 0.4, -100)
loss = model(x, y)[1]
loss.backward()
gradient = model.transformer.wte.weight.grad.clone()
model.zero_grad()
logits = model(x)[0].double()[y != -100]
z = logits.exp().sum(-1).log()
right = logits.gather(1, y[y != -100][:, None])[:, 0]
expected = (z - right + 1e-4 * z**2).mean()
expected.backward()
assert torch.isclose(loss.double(), expected), (loss, expected)
assert torch.allclose(gradient, model.transformer.wte.weight.grad, atol=1e-6)
# the validation loss stays what it is
assert torch.isclose(model.eval()(x, y)[1].double(), (z - right).mean())
"""


def test_a_new_loss_is_its_formula_with_its_gradient(solved, talk):
    python = solved("loss")
    python("-c", LOSS)
    python("prepare/jsonl.py", f"--source={talk}", "--out_dir=data/talk")
    python("train.py", "--init_from=scratch", "--max_iters=2", "--log_interval=1", *TINY)
