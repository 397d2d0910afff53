"""Whatever a user gets wrong, in any script, ends in one or two lines that name it, and status 2.

What an error does to the files of its script is tested with that script. Here each kind of error
meets a few scripts, and in `make test-all` every script.
"""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, largest_file, small_talk, write_jsonl, write_shards

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.shards import ShardWriter
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel

SCRIPTS = []
for folder in (".", "prepare", "evaluation", "benchmarks"):
    for path in sorted((ROOT / folder).glob("*.py")):
        if path.read_text(encoding="utf-8").endswith(", Config)\n"):
            SCRIPTS.append(str(path.relative_to(ROOT)))
GENERATED = ("prepare/chitchat.py", "prepare/recall.py")  # they need no source
CORPORA = [name for name in SCRIPTS if name.startswith("prepare/") and name not in GENERATED]

TRAIN = ["--dataset=talk", "--block_size=64", "--batch_size=2", "--device=cpu", "--max_iters=1"]
PPO = ["--dataset=talk", "--rollouts=2", "--batch_size=2", "--device=cpu", "--max_iters=1"]
MODELS = {  # the scripts that load a model: the arguments with which they get that far
    "train.py": [*TRAIN, "--gradient_accumulation_steps=1"],
    "train_reward.py": [*TRAIN, "--gradient_accumulation_steps=1", "--dataset=rated"],
    "train_ppo.py": [*PPO, "--max_new_tokens=4", "--max_prompt=32", "--reward=length:9"],
    "chat.py": ["--device=cpu"],
    "sample.py": ["--device=cpu"],
    "serve.py": ["--device=cpu", "--port=0"],
    "evaluate.py": ["--device=cpu", "--dataset=talk", "--replies=1", "--probes=0"],
    "evaluation/attention.py": ["--dataset=talk", "--layer=0"],
    "evaluation/first_batches.py": ["--device=cpu", "--dataset=talk", "--batches=1"],
    "evaluation/repetition.py": ["--device=cpu", "--dataset=talk"],
    "benchmarks/best_of.py": ["--device=cpu", "--dataset=talk", "--reward=reward"],
    "benchmarks/decode.py": ["--device=cpu", "--prompt_len=8", "--new_tokens=8"],
    "benchmarks/fidelity.py": ["--device=cpu", "--dataset=talk"],
}
READERS = [name for name, args in MODELS.items() if "--dataset=talk" in args]
FETCHED = ["personachat", "spc", "eli5", "columned_chat"]


def each(names, *quick):
    """Return the names as parameters; those that are not quick run in `make test-all`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with data/talk and data/rated, a small model, a reward model and a picture."""
    folder = tmp_path_factory.mktemp("material")
    write_shards(folder / "data/talk", small_talk(30, seed=1), small_talk(30, seed=2))
    tokenizer = Tokenizer()
    for split in ("train", "val"):
        path = folder / f"data/rated/{split}.bin"
        with ShardWriter(path, tokenizer.n_vocab, tokenizer.template) as writer:
            for i, messages in enumerate(small_talk(20)):
                ids, mask = tokenizer.render(messages)
                writer.write([(ids, mask if i % 2 else [0] * len(ids))])
    torch.manual_seed(0)
    config = GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32)
    save_model(GPT(config), tokenizer, folder / "tiny")
    save_model(RewardModel(config), tokenizer, folder / "reward")
    head = bytes.fromhex("89504e470d0a1a0a0000000d49484452")
    (folder / "picture.png").write_bytes(head + bytes(range(256)) * 8)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, material):
    """In a folder with links to the material."""
    monkeypatch.chdir(tmp_path)
    for path in material.iterdir():
        Path(path.name).symlink_to(path)
    Path("data").unlink()
    Path("data").mkdir()
    for path in (material / "data").iterdir():
        Path("data", path.name).symlink_to(path)


@pytest.fixture
def empty_caches(monkeypatch):
    """As on a new machine: no file of the hub is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", "nothing")
    monkeypatch.setenv("HF_HOME", "nothing")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.fixture
def call(as_main):
    """Run a script that loads a model, or any other."""
    return lambda name, *args: as_main(name, *MODELS.get(name, []), *args)


@pytest.mark.parametrize("name", each(SCRIPTS, "train.py", "chat.py", "prepare/jsonl.py"))
def test_an_unknown_knob(as_main, name):
    assert_refused(as_main(name, "--sead=1"), "'sead'")


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", each(MODELS, "train.py", "sample.py", "evaluate.py"))
@pytest.mark.parametrize("model", ["out/nowhere", "picture.png"])
def test_a_model_that_does_not_exist_or_is_another_file(call, name, model):
    assert_refused(call(name, f"--init_from={model}"), model)


@pytest.mark.parametrize("name", each(MODELS, "train.py", "sample.py"))
def test_weights_that_are_cut(call, name, material):
    Path("cut").mkdir()
    for path in (material / "tiny").iterdir():
        end = -1000 if path.name == "model.safetensors" else None
        Path("cut", path.name).write_bytes(path.read_bytes()[:end])
    assert_refused(call(name, "--init_from=cut"), "cut/model.safetensors")


@pytest.mark.parametrize("name", each(MODELS, "train.py", "sample.py"))
def test_weights_to_be_downloaded_without_a_network(call, name, empty_caches):
    done = call(name, "--init_from=gpt2")
    assert_refused(done, "openai-community/gpt2", "HF_HUB_OFFLINE")


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", each([*READERS, "train_reward.py"], "train.py", "evaluate.py"))
def test_a_dataset_that_does_not_exist(call, name):
    done = call(name, "--init_from=tiny", "--dataset=nowhere")
    assert_refused(done, "data/nowhere/")


@pytest.mark.parametrize("name", each([*READERS, "train_reward.py"], "train.py", "evaluate.py"))
def test_a_shard_that_is_another_file(call, name):
    Path("data/other").mkdir()
    for split in ("train", "val"):
        Path(f"data/other/{split}.bin").write_bytes(Path("picture.png").read_bytes()[:-1])
    assert_refused(call(name, "--init_from=tiny", "--dataset=other"), "data/other/", ".bin")


@pytest.mark.parametrize("name", each(CORPORA, "prepare/jsonl.py", "prepare/personachat.py"))
@pytest.mark.parametrize("source", ["nowhere", "picture.png", "folder"])
def test_a_source_that_does_not_exist_or_is_something_else(as_main, name, source):
    Path("folder").mkdir()
    done = as_main(name, f"--source={source}", "--out_dir=data/new")
    assert_refused(done, source)
    assert not Path("data/new").exists()


@pytest.mark.parametrize("name", each(FETCHED, "personachat", "spc"))
def test_a_corpus_to_be_downloaded_without_a_network(as_main, name, empty_caches, monkeypatch):
    def refuse(*_):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("NO_PROXY", "*")
    done = as_main(f"prepare/{name}.py", "--out_dir=data/new")
    # a line for each way but the last, then the error
    lines = done.stderr.splitlines(keepends=True)
    done.stderr = "".join(line for line in lines if "passed over" not in line)
    assert_refused(done, "parl.ai" if name == "personachat" else "HF_HUB_OFFLINE", "--source")
    assert not Path("data/new").exists()


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("train.py", "out/chat"),
        pytest.param("train_reward.py", "out/reward", marks=pytest.mark.slow),
        pytest.param("train_ppo.py", "out/ppo", marks=pytest.mark.slow),
        ("evaluate.py", "report.html"),
    ],
)
def test_a_full_disk(call, name, written):
    report = ["--report=report.html", "--replies=20"] if name == "evaluate.py" else []
    with largest_file(3000):  # more than is printed, which may go to a file too
        done = call(name, "--init_from=tiny", *report)
    assert_refused(done, written, "free some space")
    assert not list(Path().rglob("*.part"))


@pytest.mark.parametrize("name", each(["jsonl", "text", "retry"], "jsonl"))
def test_a_full_disk_in_a_preparation(as_main, name):
    write_jsonl(Path("jsonl.jsonl"), small_talk(60))
    Path("text.txt").write_text("\n\n".join(f"paragraph {i}" for i in range(2000)))
    pairs = ""
    for n in range(200):
        pairs += f'{{"text": "[Human]: {n}\\n[Bot]: {n}", "label": {n % 2}}}\n'
    Path("retry.jsonl").write_text(pairs)
    source = "text.txt" if name == "text" else f"{name}.jsonl"
    with largest_file(500):
        done = as_main(f"prepare/{name}.py", f"--source={source}", "--out_dir=data/new")
    assert_refused(done, "data/new", "free some space")
    assert not Path("data/new").exists()
