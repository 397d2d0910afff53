"""lm-evaluation-harness on a directory that train.py has written, as the README says, and on a
server of it: nothing is converted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.ranking import loglikelihoods
from nanochatgpt.checkpoint import load_model

pytestmark = pytest.mark.slow

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a potato", "seven"], "answer": 0},
    {"question": "Two and two are", "choices": ["green", "four", "cats and dogs"], "answer": 1},
    {"question": "Cats say", "choices": ["moo", "woof", "meow meow"], "answer": 2},
    {"question": "Fire is", "choices": ["hot", "wet water", "blue"], "answer": 0},
]
TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def harness(script, data_dir, tmp_path):
    """Train a small model to `out` and run lm-evaluation-harness beside it: harness(model,
    model_args, batch_size) -> its samples of the task above."""
    pytest.importorskip("datasets")  # of the extra lm-eval
    args = ["--init_from=scratch", f"--data_dir={data_dir}", "--dataset=talk", "--out_dir=out"]
    args += ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=64", "--batch_size=4"]
    args += ["--max_iters=20", "--eval_interval=20", "--gradient_accumulation_steps=1"]
    assert script("train.py", *args, "--learning_rate=1e-2").returncode == 0
    (tmp_path / "tasks").mkdir()
    lines = [json.dumps(question) + "\n" for question in QUESTIONS]
    (tmp_path / "tiny.jsonl").write_text("".join(lines))
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=tmp_path / "tiny.jsonl"))
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}

    def run(model, model_args, batch_size=1):
        command = [Path(sys.executable).parent / "lm_eval", "--model", model]
        command += ["--model_args", model_args, "--tasks", "tiny", "--include_path", "tasks"]
        command += ["--device", "cpu", "--output_path", model, "--log_samples"]
        command += ["--batch_size", str(batch_size)]
        options = {"capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(command, cwd=tmp_path, env=env, **options)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / model).rglob("samples_tiny_*.jsonl")
        samples = map(json.loads, file.read_text().splitlines())
        return sorted(samples, key=lambda sample: sample["doc_id"])

    return run


def test_its_loglikelihoods_are_our_own(harness, tmp_path):
    samples = harness("hf", "pretrained=out,dtype=float32")
    model, tokenizer = load_model(str(tmp_path / "out"))
    for question, sample in zip(QUESTIONS, samples, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        choices = [tokenizer.encode(" " + choice) for choice in question["choices"]]
        assert theirs == pytest.approx(
            loglikelihoods(model, tokenizer.encode(question["question"]), choices), rel=1e-4
        )
        assert sample["acc"] == (theirs.index(max(theirs)) == question["answer"])


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_server_gets_the_results_of_its_directory(harness, serving, tmp_path, batch_size):
    expected = harness("hf", "pretrained=out,dtype=float32")
    with serving(f"--init_from={tmp_path / 'out'}", "--dtype=float32") as server:
        args = f"model=out,tokenizer=out,base_url={server.url}/v1/completions,max_length=64"
        samples = harness("local-completions", args, batch_size)
    for sample, other in zip(samples, expected, strict=True):
        assert sample["acc"] == other["acc"]
        for response, other_response in zip(sample["resps"], other["resps"], strict=True):
            (logprob, is_greedy), (other_logprob, other_is_greedy) = response[0], other_response[0]
            assert float(logprob) == pytest.approx(float(other_logprob), rel=1e-4)
            assert is_greedy == other_is_greedy
