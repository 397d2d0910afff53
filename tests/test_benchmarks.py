"""Benchmarks: their figures agree with each other and with transformers; mistakes are refused."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, small_talk, write_shards
from transformers import GPT2LMHeadModel

from benchmarks import common
from benchmarks.serve import Reply, same
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel

NAMES = ("best_of", "candidates", "decode", "fidelity", "prepare", "serve", "train")
N_VOCAB = 50257


@pytest.fixture
def tiny(tmp_path):
    """A model of 64 positions, with weights large enough for distributions far from uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10)
    save_model(model, Tokenizer(), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def bench(as_main, monkeypatch, tmp_path, tiny):
    """Run a benchmark in this process with the tiny model: bench("decode", rows=2)."""
    monkeypatch.chdir(tmp_path)

    def run(name, **knobs):
        if name != "prepare":
            knobs = {"init_from": "tiny", "device": "cpu"} | knobs
        args = [f"--{knob}={value}" for knob, value in knobs.items()]
        return as_main(f"benchmarks/{name}.py", *args)

    return run


def figures(done, name):
    """Return the JSON object that is the only line on stdout."""
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert result["bench"] == name
    assert result["torch"] == torch.__version__
    if name != "fidelity":  # which measures no speed
        assert result["tokens_per_s"] > 0 and result["seconds"] > 0
    return result


def nearly(value):
    return pytest.approx(value, rel=1e-3)  # figures have five digits


# --- what all share -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_measured_and_lists_the_knobs(as_main, name):
    done = as_main(f"benchmarks/{name}.py", "--help")
    assert done.returncode == 0
    assert f"python benchmarks/{name}.py" in done.stdout
    assert "--megabytes" in done.stdout if name == "prepare" else "--init_from" in done.stdout


@pytest.mark.parametrize(
    ("name", "knobs", "words"),
    [
        ("decode", {"rows": 0}, ["rows=0"]),
        ("decode", {"repeats": 0}, ["repeats=0"]),
        ("decode", {"prompt_len": 50, "new_tokens": 15}, ["prompt_len=50", "new_tokens=15", 64]),
        ("decode", {"init_from": "random:gpt9"}, ["random:gpt9"]),
        ("fidelity", {"positions": 0}, ["positions=0"]),
        ("fidelity", {"data_dir": "nowhere"}, ["nowhere/chitchat/val*.bin"]),
        ("fidelity", {"init_from": "out/nothing", "dataset": "talk"}, ["out/nothing"]),
        ("train", {"steps": 0}, ["steps=0"]),
        ("train", {"loop": "fast"}, ["loop=fast", "packed", "nanogpt", "padded"]),
        ("prepare", {"megabytes": 0}, ["megabytes=0"]),
        ("candidates", {"source": "nothing.txt"}, ["nothing.txt"]),
        ("best_of", {"n": 0}, ["n=0"]),
        ("serve", {"clients": 0}, ["clients=0"]),
    ],
)
def test_mistakes_are_refused_by_name(bench, data_dir, name, knobs, words):
    done = bench(name, **knobs)
    assert_refused(done, *words)
    assert done.stdout == ""


@pytest.mark.parametrize("model_class", [GPT, RewardModel])
def test_random_weights_are_written_once(monkeypatch, tmp_path, model_class):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(common.PRESETS, "small", {"n_layer": 1, "n_head": 2, "n_embd": 8})
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    directory = common.resolve("random:small", model_class)
    model, _ = load_model(directory, model_class=model_class)
    assert (model.config.n_layer, model.config.n_embd) == (1, 8)
    assert [path.name for path in Path("out/random").iterdir()] == [Path(directory).name]

    # the second call takes the same files; without them, the same weights come again
    weights = Path(directory) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    content = weights.read_bytes()
    assert common.resolve("random:small", model_class) == directory
    assert weights.stat().st_mtime_ns == before
    Path(directory).rename("elsewhere")
    common.resolve("random:small", model_class)
    assert weights.read_bytes() == content
    assert common.resolve("tiny") == "tiny"


@pytest.mark.slow
def test_writing_random_weights_does_not_count_as_peak_memory(script):
    knobs = ["--init_from=random:distilgpt2", "--dtype=int8", "--device=cpu", "--repeats=1"]
    first, second = (
        figures(script("benchmarks/decode.py", *knobs, "--new_tokens=8"), "decode") for _ in "ab"
    )
    assert first["peak_memory_mb"] == pytest.approx(second["peak_memory_mb"], rel=0.1)


# --- decode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_figures_of_decode_agree(bench, dtype):
    knobs = {"rows": 3, "prompt_len": 20, "new_tokens": 15, "repeats": 2, "dtype": dtype}
    done = bench("decode", **knobs)
    result = figures(done, "decode")
    assert len(done.stderr.splitlines()) == 1 + 2  # a line per repeat, after the warm-up's
    assert result["config"] == result["config"] | knobs
    assert result["device"] == "cpu"
    assert result["dtype"] in (("float32",) if dtype == "float32" else ("float16", "float32"))

    # reading the prompts gives the first token of each row, each other token takes a step
    assert result["tokens_per_s"] * result["seconds"] == nearly(3 * 15)
    prompt_seconds = 3 * 20 / result["prompt_tokens_per_s"]
    new_seconds = 3 * 14 / result["new_tokens_per_s"]
    assert prompt_seconds + new_seconds == nearly(result["seconds"])
    weights = 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32) + N_VOCAB * 32  # layers, head
    gigabytes = weights * {"float32": 4, "float16": 2}[result["dtype"]] / 1e9
    assert result["weights_gb_per_s"] == nearly(gigabytes * 14 / new_seconds)
    assert 0 < result["first_token_s"] < 60
    assert 100 < result["peak_memory_mb"] < 4000  # torch alone takes more than 100


def test_one_new_token_takes_no_further_step(bench):
    result = figures(bench("decode", prompt_len=63, new_tokens=1, repeats=1), "decode")
    assert result["new_tokens_per_s"] is None
    assert result["weights_gb_per_s"] is None
    assert result["tokens_per_s"] * result["seconds"] == nearly(1)


# --- fidelity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [("float32", 0, 1e-7), ("float16", 0, 1e-4), ("int8", 1e-4, 1.0)],  # nats
)
def test_fidelity_compares_with_float32(bench, tiny, data_dir, dtype, least, most):
    done = bench("fidelity", dataset="talk", dtype=dtype, positions=150)
    result = figures(done, "fidelity")
    assert result["positions"] == 150
    assert least <= result["kl"] < most
    assert 0 <= result["same_top"] <= 1
    if dtype != "int8":
        assert result["same_top"] >= 0.99
        assert result["perplexity"] == pytest.approx(result["perplexity_float32"], rel=0.01)

    # transformers' perplexity, of blocks as long as the context
    tokens = open_shard(data_dir / "talk" / "val.bin").tokens[:151].astype("int64")
    tokens = torch.from_numpy(tokens)
    model = GPT2LMHeadModel.from_pretrained(tiny).eval()
    loss = 0.0
    for start in range(0, 150, 64):
        block = tokens[start : start + 65]
        with torch.no_grad():
            logits = model(block[None, :-1]).logits[0]
        loss += F.cross_entropy(logits, block[1:], reduction="sum").item()
    assert result["perplexity_float32"] == nearly(math.exp(loss / 150))


def test_fidelity_stops_at_the_end_of_the_text(bench, tmp_path):
    write_shards(tmp_path / "data" / "talk", small_talk(1), small_talk(1))
    n = len(open_shard(tmp_path / "data" / "talk" / "val.bin").tokens)
    done = bench("fidelity", dataset="talk", dtype="float16", positions=10**6)
    assert figures(done, "fidelity")["positions"] == n - 1


# --- train, prepare -------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["packed", "nanogpt", "padded"])
def test_the_figures_of_train_agree(bench, data_dir, loop):
    knobs = {"batch_size": 2, "block_size": 64, "steps": 1, "dtype": "float32"}
    result = figures(bench("train", loop=loop, dataset="talk", **knobs), "train")
    assert 0 < result["supervised_tokens_per_s"] < result["tokens_per_s"]
    assert 0 < result["fill"] <= 1
    assert result["first_step_s"] > 0
    n_tokens = result["tokens_per_s"] * result["seconds"]
    if loop == "padded":  # cut at the longest of the batch
        assert result["fill"] * 128 >= n_tokens * 0.999
    else:
        assert n_tokens == nearly(result["fill"] * 128)

    # random tokens are all supervised
    result = figures(bench("train", loop=loop, **knobs), "train")
    assert result["fill"] == 1
    assert result["supervised_tokens_per_s"] == result["tokens_per_s"]
    assert result["tokens_per_s"] * result["seconds"] == nearly(128)


def test_the_figures_of_prepare_agree(script):
    """As a process, whose folder has a prepare.py too."""
    result = figures(script("benchmarks/prepare.py", "--megabytes=1"), "prepare")
    assert result["megabytes"] == pytest.approx(1, abs=0.01)
    # GPT-2's tokens have about four characters, and the chat format adds some
    assert result["tokens_per_s"] * result["seconds"] == pytest.approx(1e6 / 4, rel=0.4)
    assert result["megabytes_per_s"] * result["seconds"] == pytest.approx(1, abs=0.01)
    assert result["tiktoken_megabytes_per_s"] > 0
    assert result["peak_memory_mb"] >= result["peak_memory_before_mb"] > 0


# --- candidates, best_of --------------------------------------------------------------------------


def test_candidates_are_scored_together_and_alone(bench, tmp_path):
    lines = ["1 your persona: i like tea."]
    lines += [f"{i} hi {i}\tyes {i}\t\tno|why|yes {i}" for i in range(2, 8)]
    (tmp_path / "valid.txt").write_text("\n".join(lines) + "\n")
    result = figures(bench("candidates", source="valid.txt"), "candidates")
    assert result["ratio"] == nearly(result["seconds"] / result["seconds_alone"])


def test_rewards_rise_with_the_number_of_replies(bench, tmp_path):
    judge = RewardModel(GPTConfig(64, n_layer=1, n_head=2, n_embd=32))
    save_model(judge, Tokenizer(), tmp_path / "judge")
    write_shards(tmp_path / "data" / "talk", small_talk(5), small_talk(8, seed=1))
    knobs = {"reward": "judge", "dataset": "talk", "n": 3, "most": 5, "prompts": 4}
    if find_spec("matplotlib"):
        knobs["png"] = "curve.png"
    result = figures(bench("best_of", max_new_tokens=8, **knobs), "best_of")
    assert result["ratio"] == nearly(result["seconds"] / result["seconds_of_one"])
    rewards = list(result["rewards"].values())
    assert list(result["rewards"]) == ["1", "2", "4"]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
    assert result["std"] > 0
    if find_spec("matplotlib"):
        assert Path("curve.png").read_bytes().startswith(b"\x89PNG")


# --- serve ----------------------------------------------------------------------------------------


def test_all_clients_get_the_replies_that_one_gets(bench):
    knobs = {"clients": 3, "prompt_len": 5, "new_tokens": 6, "rounds": 1, "soak": 20}
    result = figures(bench("serve", **knobs), "serve")
    assert result["ratio"] == nearly(result["tokens_per_s"] / result["one_tokens_per_s"])
    assert result["lost"] == result["mixed_up"] == 0
    longest = result["longest_first_token_s"]
    assert 0 < result["first_token_s"] <= longest
    assert result["first_token_s"] / 2 < result["slowest_clients_first_token_s"] <= longest


def test_replies_are_the_same_up_to_a_tie():
    def reply(*tokens):
        """A reply of tokens, each with other likely ones: ("a", {"b": -1.0})."""
        text = "".join(token for token, _ in tokens)
        logprobs = [(token, {token: -0.5} | others) for token, others in tokens]
        return Reply(0, text, len(tokens), 0.1, logprobs)

    a = reply(("a", {"b": -0.9}), ("c", {"d": -0.51}))
    assert same(a, reply(("a", {}), ("c", {})))
    assert same(a, reply(("a", {}), ("d", {})))  # 0.01 nats apart
    assert not same(a, reply(("b", {}), ("c", {})))  # 0.4
    assert not same(a, reply(("a", {}), ("e", {})))  # not among the most likely
    assert not same(a, reply(("a", {})))  # the end is lost
    assert not same(reply(("a", {})), a)
