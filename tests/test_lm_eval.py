"""lm-evaluation-harness on a directory that train.py has written, as the README says: nothing is
converted."""

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


def test_its_loglikelihoods_are_our_own(script, data_dir, tmp_path):
    pytest.importorskip("datasets")  # of the extra lm-eval
    shape = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=64",
        "--batch_size=4",
        "--max_iters=20",
    ]
    run = [
        "--init_from=scratch",
        f"--data_dir={data_dir}",
        "--dataset=talk",
        "--out_dir=out",
        "--learning_rate=1e-2",
    ]
    assert (
        script(
            "train.py", *run, *shape, "--eval_interval=20", "--gradient_accumulation_steps=1"
        ).returncode
        == 0
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tiny.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    )
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=tmp_path / "tiny.jsonl"))
    command = [
        Path(sys.executable).parent / "lm_eval",
        "--model",
        "hf",
        "--model_args",
        "pretrained=out,dtype=float32",
    ]
    command += [
        "--tasks",
        "tiny",
        "--include_path",
        "tasks",
        "--device",
        "cpu",
        "--output_path",
        "results",
        "--log_samples",
    ]
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").rglob("samples_tiny_*.jsonl")
    samples = sorted(
        map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"]
    )

    model, tokenizer = load_model(str(tmp_path / "out"))
    for question, sample in zip(QUESTIONS, samples, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        choices = [tokenizer.encode(" " + choice) for choice in question["choices"]]
        assert theirs == pytest.approx(
            loglikelihoods(model, tokenizer.encode(question["question"]), choices), rel=1e-4
        )
        assert sample["acc"] == (theirs.index(max(theirs)) == question["answer"])
