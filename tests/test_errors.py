"""Whatever a person can cause or meet, on whatever script, ends in a line or two that name it, and status 2.

What each kind of error does to what was there is tried in the tests of the file that meets it.
"""

import resource
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, largest_file, small_talk, write_jsonl, write_shards
from test_train_reward import replies, write_replies

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel

PREPARE = sorted(
    path.stem for path in (ROOT / "prepare").glob("*.py") if path.stem not in ("corpus", "recall")
)
TRAIN = [
    "--dataset=talk",
    "--block_size=64",
    "--batch_size=2",
    "--gradient_accumulation_steps=1",
    "--device=cpu",
]
PPO = [
    "--dataset=talk",
    "--rollouts=2",
    "--batch_size=2",
    "--max_new_tokens=4",
    "--max_prompt=32",
    "--device=cpu",
]
PPO += ["--normalize_on=2", "--eval_replies=2", "--reward=share:i"]
# every script that takes a model, and what else it needs to come as far
MODELS = {
    "train.py": [*TRAIN, "--max_iters=1"],
    "train_reward.py": [*TRAIN, "--dataset=kept", "--max_iters=1"],
    "train_ppo.py": [*PPO, "--max_iters=1"],
    "chat.py": ["--device=cpu"],
    "sample.py": ["--device=cpu"],
    "serve.py": ["--device=cpu", "--port=0"],
    "evaluate.py": ["--device=cpu", "--dataset=talk", "--replies=1", "--probes=0"],
    "bench.py decode": ["--device=cpu", "--prompt_len=8", "--new_tokens=8"],
    "bench.py fidelity": ["--device=cpu", "--dataset=talk"],
    "bench.py best_of": ["--device=cpu", "--dataset=talk", "--reward=reward"],
    "figures.py attention": ["--dataset=talk", "--layer=0"],
    "figures.py repetition": ["--device=cpu", "--dataset=talk"],
}
ALL = [
    *MODELS,
    "plot.py",
    "bench.py train",
    "bench.py prepare",
    "bench.py candidates",
    "bench.py serve",
]
ALL += [f"prepare/{name}.py" for name in (*PREPARE, "recall")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """In a folder with data/talk and data/kept, and a small model and a reward model."""
    monkeypatch.chdir(tmp_path)
    write_shards("data/talk", small_talk(30, seed=1), small_talk(30, seed=2))
    for split in ("train", "val"):
        write_replies("data/kept", split, replies(20))
    torch.manual_seed(0)
    config = GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32)
    save_model(GPT(config), Tokenizer(), "tiny")
    save_model(RewardModel(config), Tokenizer(), "reward")
    Path("picture.png").write_bytes(
        bytes.fromhex("89504e470d0a1a0a0000000d49484452") + bytes(range(256)) * 8
    )


@pytest.fixture
def empty_caches(monkeypatch):
    """As on a new machine: no file of the hub is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", "nothing")
    monkeypatch.setenv("HF_HOME", "nothing")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.fixture
def call(as_main):
    """Run a script by its name, a mode of it behind a space: call("bench.py decode", "--rows=2")."""
    return lambda name, *args: as_main(*name.split(), *args)


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_knob(call, name):
    assert_refused(call(name, "--sead=1"), "unknown knob 'sead'")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_not_there(call, name):
    assert_refused(call(name, *MODELS[name], "--init_from=out/nowhere"), "out/nowhere")


@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_the_place_of_a_model(call, name):
    assert_refused(call(name, *MODELS[name], "--init_from=picture.png"), "picture.png")


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_cut(call, name):
    weights = Path("tiny/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(call(name, *MODELS[name], "--init_from=tiny"), "tiny/model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_to_be_fetched_without_a_network(call, name, empty_caches):
    assert_refused(
        call(name, *MODELS[name], "--init_from=gpt2"), "openai-community/gpt2", "HF_HUB_OFFLINE"
    )


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name != "bench.py fidelity"]
)  # takes no random model
def test_not_enough_memory_for_a_model(call, name):
    """There are 200 MB more than are used, and the model needs 1.4 GB."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, limits[1]))
    try:
        done = call(name, *MODELS[name], "--init_from=random:gpt2-medium")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert_refused(done, "not enough memory")


@pytest.mark.parametrize(
    "name", [name for name, args in MODELS.items() if any("--dataset" in arg for arg in args)]
)
def test_a_data_set_that_is_not_there(call, name):
    assert_refused(
        call(name, *MODELS[name], "--init_from=tiny", "--dataset=nowhere"), "data/nowhere/"
    )


@pytest.mark.parametrize(
    "name", [name for name, args in MODELS.items() if any("--dataset" in arg for arg in args)]
)
def test_a_shard_that_is_none(call, name):
    Path("data/other").mkdir()
    for split in ("train", "val"):
        Path(f"data/other/{split}.bin").write_bytes(Path("picture.png").read_bytes()[:-1])
    done = call(name, *MODELS[name], "--init_from=tiny", "--dataset=other")
    assert_refused(done, f"data/other/{'train' if name.startswith('train') else 'val'}.bin")


@pytest.mark.parametrize("name", PREPARE)
@pytest.mark.parametrize("source", ["nowhere", "picture.png", "folder"])
def test_a_source_that_is_not_there_or_something_else(call, name, source):
    Path("folder").mkdir()
    done = call(f"prepare/{name}.py", f"--source={source}", "--out_dir=data/new")
    assert_refused(done, source)
    assert not Path("data/new").exists()


@pytest.mark.parametrize(
    "name", [name for name in PREPARE if name not in ("jsonl", "text", "chitchat", "retry")]
)
def test_a_corpus_that_is_to_be_fetched_without_a_network(call, name, empty_caches, monkeypatch):
    monkeypatch.setattr(
        "socket.socket.connect", lambda *_: (_ for _ in ()).throw(OSError("Network is unreachable"))
    )
    done = call(f"prepare/{name}.py", "--out_dir=data/new")
    assert_refused(done, "parl.ai" if name == "personachat" else "HF_HUB_OFFLINE")
    assert not Path("data/new").exists()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("train.py", "out/chat"),
        ("train_reward.py", "out/reward"),
        ("train_ppo.py", "out/ppo"),
        ("evaluate.py", "report.html"),
    ],
)
def test_a_full_disk(call, name, written):
    with largest_file(5000):  # more than is printed: that goes to a file too
        done = call(
            name,
            *MODELS[name],
            "--init_from=tiny",
            *["--report=report.html"] * (name == "evaluate.py"),
        )
    assert_refused(done, written)
    assert not list(Path().rglob("*.part"))


@pytest.mark.parametrize("name", ["jsonl", "text", "retry"])
def test_a_full_disk_in_a_preparation(call, name):
    write_jsonl(Path("mine.jsonl"), small_talk(60))
    Path("text").mkdir()
    for n in range(4):
        Path(f"text/{n}.txt").write_text("\n\n".join(f"paragraph {n} {i}" for i in range(200)))
    pairs = "".join(
        f'{{"text": "[Human]: {n}\\n[Bot]: {n}", "label": {n % 2}}}\n' for n in range(200)
    )
    Path("retry.jsonl").write_text(pairs)
    source = {"jsonl": "mine.jsonl", "text": "text", "retry": "retry.jsonl"}[name]
    with largest_file(500):
        done = call(f"prepare/{name}.py", f"--source={source}", "--out_dir=data/new")
    assert_refused(done, "data/new")
    assert not Path("data/new").exists()


def test_the_seventeenth_line_is_bad(call):
    lines = write_jsonl(Path("mine.jsonl"), small_talk(30)).read_text().splitlines()
    lines[16] = lines[16][:-2]
    Path("mine.jsonl").write_text("\n".join(lines))
    done = call("prepare/jsonl.py", "--source=mine.jsonl", "--out_dir=data/new")
    assert_refused(done, "mine.jsonl, line 17 is not JSON")
    assert not Path("data/new").exists()
