"""The benchmark's figures agree with each other and with what transformers computes; mistakes end in two lines."""

import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, small_talk, write_shards
from transformers import GPT2LMHeadModel

import bench
from benchmarks.serve import Heard, same
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel


@pytest.fixture
def directory(tmp_path):
    """A tiny model of 64 positions, with weights that are large enough for distributions far from even."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=64, vocab_size=Tokenizer().n_vocab, n_layer=2, n_head=2, n_embd=32)
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10)
    save_model(model, Tokenizer(), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def here(monkeypatch, tmp_path, in_process):
    """Run bench.py in this process, in an empty folder: here("decode", "--rows=2")."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(in_process, bench.main, "bench.py")


def result_of(done):
    """Return the JSON object that is all there is on stdout."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_decode_measures_what_it_says_and_its_figures_agree(script, here, directory, dtype):
    knobs = {
        "rows": 3,
        "prompt_len": 20,
        "new_tokens": 15,
        "repeats": 2,
        "dtype": dtype,
        "device": "cpu",
    }
    args = "decode", f"--init_from={directory}", *(f"--{k}={v}" for k, v in knobs.items())
    done = script("bench.py", *args) if dtype == "float32" else here(*args)
    result = result_of(done)
    assert result["bench"] == "decode"
    assert result["config"] == result["config"] | knobs | {"init_from": str(directory)}
    assert result["device"] == "cpu"
    assert (
        result["dtype"] == dtype if dtype != "auto" else result["dtype"] in ("float16", "float32")
    )
    assert result["torch"] == torch.__version__
    assert (
        len(done.stderr.splitlines()) == 1 + 2
    )  # a line for each repeat, and the one that does not count

    def nearly(value):
        return pytest.approx(value, rel=3e-4)  # figures have five digits

    assert result["tokens_per_s"] * result["seconds"] == nearly(3 * 15)
    # reading the prompts gives the first token of each row; the others take a step each
    reading, writing = 3 * 20 / result["prompt_tokens_per_s"], 3 * 14 / result["new_tokens_per_s"]
    assert reading + writing == nearly(result["seconds"])
    weights = (
        2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32) + Tokenizer().n_vocab * 32
    )  # of each layer, and the head
    gigabytes = weights * {"float32": 4, "float16": 2}[result["dtype"]] / 1e9
    assert result["weights_gb_per_s"] == nearly(gigabytes * 14 / writing)
    assert 0 < result["first_token_s"] < 60
    assert 100 < result["peak_memory_mb"] < 4000  # torch alone is more than 100


def test_decode_of_one_new_token_has_no_speed_of_the_others(here, directory):
    knobs = (
        "--prompt_len=63",
        "--new_tokens=1",
        "--repeats=1",
        "--device=cpu",
    )  # which fill the context
    result = result_of(here("decode", f"--init_from={directory}", *knobs))
    assert result["new_tokens_per_s"] is None
    assert result["weights_gb_per_s"] is None
    assert result["tokens_per_s"] * result["seconds"] == pytest.approx(1, rel=3e-4)


def fidelity(here, directory, data_dir, **knobs):
    knobs = {
        "init_from": directory,
        "data_dir": data_dir,
        "dataset": "talk",
        "device": "cpu",
    } | knobs
    return here("fidelity", *(f"--{k}={v}" for k, v in knobs.items()))


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [("float32", 0, 1e-7), ("float16", 0, 1e-4), ("int8", 1e-4, 1.0)],  # nats
)
def test_fidelity_is_near_to_float32_as_the_dtype_is(here, directory, data_dir, dtype, least, most):
    done = fidelity(here, directory, data_dir, dtype=dtype, positions=150)
    result = result_of(done)
    assert result["bench"] == "fidelity"
    assert result["config"]["dtype"] == dtype
    assert result["positions"] == 150
    assert least <= result["kl"] < most
    assert 0 <= result["same_top"] <= 1
    if dtype != "int8":
        assert result["same_top"] >= 0.99
        assert result["perplexity"] == pytest.approx(result["perplexity_float32"], rel=0.01)
    # float32's own perplexity is transformers', of blocks of the context's length that begin anew
    tokens = torch.from_numpy(
        open_shard(data_dir / "talk" / "val.bin").tokens[:151].astype("int64")
    )
    hf, losses = GPT2LMHeadModel.from_pretrained(directory).eval(), []
    for start in range(0, 150, 64):
        block = tokens[start : min(start + 65, 151)]
        with torch.no_grad():
            losses += F.cross_entropy(
                hf(block[None, :-1]).logits[0], block[1:], reduction="none"
            ).tolist()
    assert len(losses) == 150
    assert result["perplexity_float32"] == pytest.approx(math.exp(sum(losses) / 150), rel=1e-3)


def test_fidelity_takes_as_many_positions_as_there_are(here, directory, tmp_path):
    write_shards(tmp_path / "data" / "talk", small_talk(1), small_talk(1))
    n = len(open_shard(tmp_path / "data" / "talk" / "val.bin").tokens)
    result = result_of(
        fidelity(here, directory, tmp_path / "data", dtype="float16", positions=10**6)
    )
    assert result["positions"] == n - 1


def test_a_mode_that_is_none_is_refused(here):
    done = here("speed")
    assert_refused(done, "speed", "decode", "fidelity")
    assert done.stdout == ""


def test_without_a_mode_the_modes_are_shown(here):
    done = here()
    assert done.returncode == 0
    assert "decode" in done.stdout
    assert "fidelity" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_prompt_that_leaves_no_room_is_refused(here, directory):
    done = here(
        "decode", f"--init_from={directory}", "--device=cpu", "--prompt_len=50", "--new_tokens=15"
    )
    assert_refused(done, "prompt_len=50", "new_tokens=15", 64)
    assert done.stdout == ""


@pytest.mark.parametrize("knob", ["rows=0", "repeats=0", "prompt_len=0", "new_tokens=0"])
def test_a_number_below_1_is_refused_by_name(here, directory, knob):
    knobs = ("--device=cpu", f"--{knob}")
    assert_refused(here("decode", f"--init_from={directory}", *knobs), knob)


def test_text_that_is_missing_is_refused(script, directory):
    done = script(
        "bench.py", "fidelity", f"--init_from={directory}", "--data_dir=nowhere", "--device=cpu"
    )
    assert_refused(done, "nowhere/chitchat/val*.bin")
    assert done.stdout == ""


@pytest.mark.parametrize("mode", ["decode", "fidelity"])
def test_a_model_that_is_missing_is_refused(here, data_dir, mode):
    knobs = () if mode == "decode" else (f"--data_dir={data_dir}", "--dataset=talk")
    assert_refused(here(mode, "--init_from=out/nothing", "--device=cpu", *knobs), "out/nothing")


def test_a_number_of_positions_below_1_is_refused_by_name(here, directory, data_dir):
    assert_refused(fidelity(here, directory, data_dir, positions=0), "positions=0")


@pytest.mark.parametrize(
    "loop", ["packed", pytest.param("nanogpt", marks=pytest.mark.slow), "padded"]
)
def test_train_measures_what_it_says_and_its_figures_agree(here, data_dir, loop):
    knobs = [
        "--init_from=random:distilgpt2",
        "--batch_size=2",
        "--block_size=64",
        "--steps=1",
        "--dtype=float32",
    ]
    result = result_of(
        here("train", *knobs, f"--loop={loop}", f"--data_dir={data_dir}", "--dataset=talk")
    )
    assert 0 < result["supervised_tokens_per_s"] < result["tokens_per_s"]
    assert 0 < result["fill"] <= 1
    assert result["first_step_s"] > 0 and result["seconds"] > 0
    if loop != "padded":
        assert result["tokens_per_s"] * result["seconds"] == pytest.approx(
            result["fill"] * 128, rel=1e-3
        )
    assert result["config"]["loop"] == loop


def test_prepare_measures_what_it_says_and_its_figures_agree(here):
    result = result_of(here("prepare", "--megabytes=1"))
    assert result["megabytes"] == pytest.approx(1, abs=0.01)
    # GPT-2's tokens have some four characters, and the chat format adds some
    assert result["tokens_per_s"] * result["seconds"] == pytest.approx(1e6 / 4, rel=0.4)
    assert result["megabytes_per_s"] * result["seconds"] == pytest.approx(1, abs=0.01)
    assert result["tiktoken_megabytes_per_s"] > 0
    assert result["peak_memory_mb"] >= result["peak_memory_before_mb"] > 0


@pytest.mark.parametrize(
    ("mode", "knob"),
    [
        ("train", "--steps=0"),
        ("train", "--loop=fast"),
        ("train", "--init_from=gpt2"),
        ("prepare", "--megabytes=0"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused_by_name(here, mode, knob):
    assert_refused(here(mode, knob), knob.removeprefix("--"))


# candidates


def test_candidates_are_scored_together_and_alone(directory, here, tmp_path):
    lines = [
        "1 your persona: i like tea.",
        *(f"{i} hi {i}\tyes {i}\t\tno|why|yes {i}" for i in range(2, 8)),
    ]
    (tmp_path / "valid.txt").write_text("\n".join(lines) + "\n")
    result = result_of(
        here("candidates", f"--init_from={directory}", "--source=valid.txt", "--device=cpu")
    )
    assert result["ratio"] == pytest.approx(result["seconds"] / result["seconds_alone"], rel=1e-3)
    assert result["tokens_per_s"] > 0
    assert_refused(here("candidates", "--source=nothing.txt"), "source=nothing.txt does not exist")


# the best of several replies


def test_the_best_of_n_replies_is_timed_beside_one_and_rewards_rise_with_n(
    directory, here, tmp_path
):
    judge = RewardModel(GPTConfig(64, n_layer=1, n_head=2, n_embd=32))
    save_model(judge, Tokenizer(), tmp_path / "judge")
    write_shards(tmp_path / "data" / "talk", small_talk(5), small_talk(8, seed=1))
    knobs = [
        "--reward=judge",
        "--dataset=talk",
        "--n=3",
        "--most=5",
        "--prompts=4",
        "--max_new_tokens=8",
    ]
    result = result_of(here("best_of", f"--init_from={directory}", *knobs, "--device=cpu"))
    assert result["ratio"] == pytest.approx(result["seconds"] / result["seconds_of_one"], rel=1e-3)
    rewards = list(result["rewards"].values())
    assert list(result["rewards"]) == ["1", "2", "4"]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1] and result["std"] > 0
    assert_refused(here("best_of", f"--init_from={directory}", "--reward=judge", "--n=0"), "n=0")


def test_a_server_is_timed_with_many_clients_beside_one_and_says_the_same_to_each(directory, here):
    knobs = [
        "--clients=3",
        "--prompt_len=5",
        "--new_tokens=6",
        "--rounds=1",
        "--soak=20",
        "--device=cpu",
    ]
    result = result_of(here("serve", f"--init_from={directory}", *knobs))
    assert result["ratio"] == pytest.approx(
        result["tokens_per_s"] / result["one_tokens_per_s"], rel=1e-3
    )
    assert (
        result["first_token_s"] / 2
        < result["slowest_clients_first_token_s"]
        <= result["longest_first_token_s"]
    )
    assert (
        result["lost"] == result["mixed_up"] == 0
        and 0 < result["first_token_s"] <= result["longest_first_token_s"]
    )
    assert_refused(here("serve", "--clients=0"), "clients=0")


def heard(*tokens):
    """A reply of tokens, each with what else was likely: ("a", {"b": -1.0})."""
    likeliest = [(token, {token: -0.5} | others) for token, others in tokens]
    return Heard(
        200, "".join(token for token, _ in tokens), len(tokens), 0.1, 0.2, likeliest=likeliest
    )


def test_replies_are_the_same_up_to_where_two_tokens_were_as_likely():
    reply = heard(("a", {"b": -0.9}), ("c", {"d": -0.51}))
    assert same(reply, heard(("a", {}), ("c", {})))
    assert same(reply, heard(("a", {}), ("d", {})))  # 0.01 nats apart
    assert not same(reply, heard(("b", {}), ("c", {})))  # 0.4
    assert not same(reply, heard(("a", {}), ("e", {})))  # not among the likeliest
    assert not same(reply, heard(("a", {}))) and not same(
        heard(("a", {})), reply
    )  # the end is lost
