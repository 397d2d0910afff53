"""Benchmarks: their figures agree with each other and with transformers; mistakes are refused."""

import json
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, small_talk, write_shards
from transformers import GPT2LMHeadModel

from benchmarks import best_of, common, decode, fidelity, prepare, serve, train
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel

N_VOCAB = 50257


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a model of 64 positions, whose weights are large enough for distributions far
    from uniform, a reward model and data/talk."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10)
    save_model(model, Tokenizer(), folder / "tiny")
    judge = RewardModel(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=32))
    save_model(judge, Tokenizer(), folder / "judge")
    write_shards(folder / "data" / "talk", small_talk(60, seed=1), small_talk(10, seed=2))
    return folder


@pytest.fixture
def measure(monkeypatch, material):
    """Call a benchmark's measure with the tiny model: measure(decode, rows=2)."""
    monkeypatch.chdir(material)

    def call(module, **knobs):
        figures = module.measure(module.Config(**{"init_from": "tiny", "device": "cpu"} | knobs))
        if module is not fidelity:  # which measures no speed
            assert figures["tokens_per_s"] > 0 and figures["seconds"] > 0
        return figures

    return call


# --- what all share -------------------------------------------------------------------------------


def test_a_script_prints_its_progress_and_one_line_of_json(script):
    """As a process, whose folder has a prepare.py too."""
    done = script("benchmarks/prepare.py", "--megabytes=1")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert done.stderr
    result = json.loads(line)
    assert result["bench"] == "prepare"
    assert result["torch"] == torch.__version__
    assert result["config"] == {"megabytes": 1, "source": "", "parquet": False}
    # GPT-2's tokens have about four characters, and the chat format adds some
    assert result["tokens_per_s"] * result["seconds"] == pytest.approx(1e6 / 4, rel=0.4)
    assert result["megabytes_per_s"] * result["seconds"] == pytest.approx(1, abs=0.01)
    assert result["tiktoken_megabytes_per_s"] > 0
    assert result["peak_memory_mb"] > 100


def test_preparing_from_parquet_makes_the_same_tokens(tmp_path):
    source = tmp_path / "talk.jsonl"
    lines = [json.dumps({"messages": messages}) for messages in small_talk(40)]
    source.write_text("\n".join(lines))
    n_tokens = []
    for parquet in (False, True):
        config = prepare.Config(megabytes=1, source=str(source), parquet=parquet)
        figures = prepare.measure(config)
        n_tokens.append(figures["tokens_per_s"] * figures["seconds"])
    assert n_tokens[0] == pytest.approx(n_tokens[1], abs=0.5)


def test_busy_processes_run_inside_the_block_and_not_after_it(monkeypatch):
    started = []
    popen = common.subprocess.Popen
    monkeypatch.setattr(
        common.subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1]
    )
    with pytest.raises(InterruptedError), common.busy_processes(2):
        assert [process.poll() for process in started] == [None, None]
        raise InterruptedError
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2


def test_a_mistake_in_a_script_is_refused(as_main):
    assert_refused(as_main("benchmarks/decode.py", "--init_from=random:gpt9"), "random:gpt9")


@pytest.mark.parametrize("model_class", [GPT, RewardModel])
def test_random_weights_are_written_once(monkeypatch, tmp_path, model_class):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(common.PRESETS, "small", {"n_layer": 1, "n_head": 2, "n_embd": 8})
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    directory = common.resolve("random:small", model_class)
    model, _ = load_model(directory, model_class=model_class)
    assert (model.config.n_layer, model.config.n_embd) == (1, 8)

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
    peaks = []
    for _ in range(2):
        done = script("benchmarks/decode.py", *knobs, "--new_tokens=8")
        peaks.append(json.loads(done.stdout)["peak_memory_mb"])
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)


# --- decode ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_the_figures_of_decode_agree(measure, capsys, dtype):
    figures = measure(decode, rows=3, prompt_len=20, new_tokens=15, repeats=2, dtype=dtype)
    assert len(capsys.readouterr().err.splitlines()) == 1 + 2  # a line per repeat and the warm-up
    assert figures["dtype"] in (("float32",) if dtype == "float32" else ("float16", "float32"))

    # reading the prompts gives the first token of each row, each other token takes a step
    assert figures["tokens_per_s"] * figures["seconds"] == pytest.approx(3 * 15)
    prompt_seconds = 3 * 20 / figures["prompt_tokens_per_s"]
    new_seconds = 3 * 14 / figures["new_tokens_per_s"]
    assert prompt_seconds + new_seconds == pytest.approx(figures["seconds"])
    weights = 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32) + N_VOCAB * 32  # layers, head
    gigabytes = weights * {"float32": 4, "float16": 2}[figures["dtype"]] / 1e9
    assert figures["weights_gb_per_s"] == pytest.approx(gigabytes * 14 / new_seconds)
    assert 100 < figures["peak_memory_mb"] < 4000  # torch alone takes more than 100


def test_decode_refuses_more_than_the_context(measure):
    with pytest.raises(ValueError, match=r"prompt_len \+ new_tokens = 65 .* 64"):
        measure(decode, prompt_len=50, new_tokens=15)


# --- fidelity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [("float32", 0, 1e-7), ("float16", 0, 1e-4), ("int8", 1e-4, 1.0)],  # nats
)
def test_fidelity_compares_with_float32(measure, dtype, least, most):
    figures = measure(fidelity, dataset="talk", dtype=dtype, positions=150)
    assert figures["positions"] == 150
    assert least <= figures["kl"] < most
    assert 0 <= figures["same_top"] <= 1
    if dtype != "int8":
        assert figures["same_top"] >= 0.99
        assert figures["perplexity"] == pytest.approx(figures["perplexity_float32"], rel=0.01)

    # transformers' perplexity, of blocks as long as the context
    tokens = torch.from_numpy(open_shard(Path("data/talk/val.bin")).tokens[:151].astype("int64"))
    model = GPT2LMHeadModel.from_pretrained("tiny").eval()
    loss = 0.0
    for start in range(0, 150, 64):
        block = tokens[start : start + 65]
        with torch.no_grad():
            logits = model(block[None, :-1]).logits[0]
        loss += F.cross_entropy(logits, block[1:], reduction="sum").item()
    assert figures["perplexity_float32"] == pytest.approx(math.exp(loss / 150), rel=1e-4)


def test_fidelity_stops_at_the_end_of_the_text(measure):
    n = len(open_shard(Path("data/talk/val.bin")).tokens)
    figures = measure(fidelity, dataset="talk", dtype="float16", positions=10**6)
    assert figures["positions"] == n - 1


# --- train ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_the_figures_of_train_agree(measure, padded):
    knobs = {"padded": padded, "batch_size": 2, "block_size": 64, "steps": 1, "dtype": "float32"}
    figures = measure(train, dataset="talk", **knobs)
    assert 0 < figures["supervised_tokens_per_s"] < figures["tokens_per_s"]
    assert 0 < figures["fill"] <= 1
    n_tokens = figures["tokens_per_s"] * figures["seconds"]
    if padded:  # cut at the longest of the batch
        assert n_tokens <= figures["fill"] * 128 * 1.001
    else:
        assert n_tokens == pytest.approx(figures["fill"] * 128)

    # random tokens are all supervised
    figures = measure(train, **knobs)
    assert figures["fill"] == 1
    assert figures["supervised_tokens_per_s"] == figures["tokens_per_s"]
    assert figures["tokens_per_s"] * figures["seconds"] == pytest.approx(128)


def test_a_padded_batch_holds_whole_conversations(material):
    tokenizer = Tokenizer()
    shards = [(material / "data" / "talk" / "train.bin", 1.0)]
    loader = train.Loader(shards, 8, 64, 0, tokenizer)
    x, y, mask = train.padded_batch(loader, 0)
    conversations = []
    for messages in small_talk(60, seed=1):
        ids, supervised = tokenizer.render(messages)
        labels = [id if s else -100 for id, s in zip(ids, supervised, strict=True)]
        conversations.append((ids[:64], labels[:64]))
    assert x.shape == y.shape == mask.shape == (8, mask.sum(1).max())
    for b, n in enumerate(mask.sum(1).tolist()):
        assert (x[b, :n].tolist(), y[b, :n].tolist()) in conversations
        assert mask[b, :n].all() and not mask[b, n:].any() and (y[b, n:] == -100).all()


# --- best_of --------------------------------------------------------------------------------------


def test_rewards_rise_with_the_number_of_replies(measure):
    knobs = {"reward": "judge", "dataset": "talk", "n": 4, "prompts": 3, "max_new_tokens": 8}
    figures = measure(best_of, **knobs)
    assert figures["ratio"] > 0 and figures["ranking_ratio"] > 0
    rewards = figures["rewards"]
    assert len(rewards) == 4
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
    assert figures["std"] > 0


# --- serve ----------------------------------------------------------------------------------------


def test_clients_of_a_server_are_timed_together_and_alone(measure, monkeypatch):
    pytest.importorskip("fastapi")
    config = serve.Config(init_from="tiny", device="cpu")
    with serve.running_server(config) as port:
        monkeypatch.setattr(serve, "running_server", lambda config: nullcontext(port))
        figures = measure(serve, clients=3, prompt_len=5, new_tokens=6, rounds=1)
        assert figures["ratio"] == figures["tokens_per_s"] / figures["one_tokens_per_s"]
        assert 0 < figures["first_token_s"] <= figures["longest_first_token_s"]

        # a request that is refused ends the benchmark
        with pytest.raises(ValueError, match="context"):
            measure(serve, clients=3, new_tokens=1000)
