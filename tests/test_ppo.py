"""PPO: its pieces by hand, its first step, a run that is resumed, rewards with a known best, and what it refuses."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    StopsAfter,
    assert_refused,
    assert_same_weights,
    records,
    small_talk,
    write_shards,
)
from safetensors.torch import load_file

import train
import train_ppo
import train_reward
from model import GPT, GPTConfig
from nanochatgpt import training
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import parse
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward import scored, scores
from rlhf.reward_model import RewardModel
from train_ppo import (
    ActorCritic,
    Rollout,
    adapted_kl_coef,
    advantages_and_returns,
    make_reward,
    policy_losses,
    roll_out,
    token_rewards,
    tokens_of,
    value_losses,
    whiten,
)

TOKENIZER = Tokenizer()
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32}
TINY = {
    "init_from": "start",
    "reward": "length:4",
    "out_dir": "out",
    "dataset": "talk",
    "device": "cpu",
}
TINY |= {
    "dtype": "float32",
    "rollouts": 8,
    "batch_size": 4,
    "max_new_tokens": 8,
    "max_prompt": 64,
    "epochs": 2,
}
TINY |= {
    "max_iters": 4,
    "eval_interval": 2,
    "eval_replies": 8,
    "normalize_on": 8,
    "learning_rate": 1e-3,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, data_dir):
    """In a folder with data/talk, a GPT to start from and a reward model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    save_model(model(), TOKENIZER, "start")
    torch.manual_seed(1)
    save_model(RewardModel(GPTConfig(128, **SHAPE)), TOKENIZER, "reward")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def model(std=0.3):
    """Return a GPT whose distributions are far from flat, and which ends replies sooner or later."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(128, **SHAPE)).eval()
    with torch.no_grad():
        gpt.transformer.wte.weight.normal_(std=std)
        gpt.transformer.ln_f.bias.normal_(std=0.5)
        gpt.transformer.wte.weight[TOKENIZER.eos_id] = gpt.transformer.ln_f.bias
    return gpt


def fit(**knobs):
    config = train_ppo.Config(**TINY | knobs)
    train_ppo.main(config)
    return Path(config.out_dir)


# ---- pieces


def test_advantages_by_hand():
    # two replies of three tokens and of one; gamma 0.5, lambda 0.25
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 0.25], [1.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    third = 2 - 0.25
    second = (0 + 0.5 * 0.25 - 1) + 0.5 * 0.25 * third
    first = (1 + 0.5 * 1 - 0.5) + 0.5 * 0.25 * second
    advantages, returns = advantages_and_returns(rewards, values, mask, 0.5, 0.25)
    torch.testing.assert_close(advantages, torch.tensor([[first, second, third], [2.0, 0.0, 0.0]]))
    torch.testing.assert_close(
        returns, torch.tensor([[first + 0.5, second + 1, 2.0], [3.0, 0.0, 0.0]])
    )


def test_with_gamma_and_lambda_1_returns_are_the_sums_of_what_comes():
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(5, 9, generator=draw), torch.randn(5, 9, generator=draw)
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 6, 2])[:, None]
    _, returns = advantages_and_returns(rewards * mask, values, mask, 1.0, 1.0)
    for row, n in enumerate([9, 1, 4, 6, 2]):
        expected = [rewards[row, t:n].sum().item() for t in range(n)]
        assert returns[row, :n].tolist() == pytest.approx(expected, abs=1e-5)


def test_whitening_looks_at_reply_tokens_only():
    x = torch.tensor([[1.0, 2.0, 100.0], [3.0, 6.0, -100.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    numbers = np.array([1.0, 2.0, 3.0, 6.0])
    expected = (numbers - numbers.mean()) / numbers.std()
    found = whiten(x, mask)
    assert found[mask].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert (found[~mask] == 0).all()


def test_a_token_is_charged_its_kl_and_the_last_one_is_given_the_score():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -3.0], [-3.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = token_rewards(torch.tensor([2.0, -1.0]), logprobs, ref_logprobs, mask, kl_coef=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.1, 2.0], [-1.2, 0.0, 0.0]]))


def test_losses_by_hand():
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    found, ratios = policy_losses(ratio.log(), torch.zeros(5), advantages, 0.2)
    torch.testing.assert_close(ratios, ratio)
    # where the ratio has moved as the advantage wants, nothing more is won; where it has not, all is lost
    assert found.tolist() == pytest.approx([-2.0, -1.2, 1.5, -0.5, 0.8])
    values, old = torch.tensor([1.0, 1.0, 0.05]), torch.tensor([0.0, 2.0, 0.0])
    found = value_losses(values, old, torch.tensor([1.0, 3.0, 1.0]), 0.2)
    assert found.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 2**2, 0.5 * 0.95**2])


def test_the_kl_coefficient_rises_above_the_target_and_falls_below():
    config = train_ppo.Config(kl_target=6.0, rollouts=100, kl_horizon=1000)
    assert adapted_kl_coef(0.1, 6.6, config) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted_kl_coef(0.1, 60.0, config) == pytest.approx(
        0.1 * (1 + 0.2 * 0.1)
    )  # no further than 0.2
    assert adapted_kl_coef(0.1, 0.0, config) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


# ---- the distribution


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probabilities_are_of_the_distribution_that_was_drawn_from(temperature):
    """Of many replies of one token, each comes as often as its probability says."""
    policy = model(std=0.4)
    config = train_ppo.Config(max_new_tokens=1, temperature=temperature)
    prompt = TOKENIZER.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)[0]
    rollout = roll_out(policy, TOKENIZER, [prompt] * 4000, config, seed=0)
    drawn = np.array([reply[0] for reply in rollout.replies])
    common, counts = np.unique(drawn, return_counts=True)
    common = common[counts.argsort()[-5:]]
    critic = ActorCritic(policy, TOKENIZER.n_vocab, temperature)
    for token in common.tolist():
        idx, *where = tokens_of(Rollout([prompt], [[token]], None), [0], "cpu")
        p = critic(idx, *where)[0].exp().item()
        share = (drawn == token).mean()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 4000) and p > 0.001


def test_log_probabilities_entropies_and_values_are_those_of_each_token():
    policy = model()
    critic = ActorCritic(
        policy, 50000, 0.7
    )  # as if the tokenizer knew fewer tokens than there are embeddings
    with torch.no_grad():
        critic.value.weight.normal_()
    rollout = Rollout([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], None)
    logprobs, entropy, values = critic(*tokens_of(rollout, [1, 0], "cpu"))
    expected = []
    for b in (1, 0):
        for n, token in enumerate(rollout.replies[b]):
            before = torch.tensor([rollout.prompts[b] + rollout.replies[b][:n]])
            distribution = torch.distributions.Categorical(
                logits=policy(before)[0][0, -1, :50000] / 0.7
            )
            value = policy.hidden(before)[0, -1] @ critic.value.weight[0]
            expected += [distribution.log_prob(torch.tensor(token)), distribution.entropy(), value]
    found = torch.stack([logprobs, entropy, values], 1).flatten()
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_values_are_0_at_the_start():
    critic = ActorCritic(model(), TOKENIZER.n_vocab, 1.0)
    assert (critic(*tokens_of(Rollout([[5]], [[6, 7]], None), [0], "cpu"))[2] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_first_minibatch_ratios_are_1_and_the_kl_is_0_exactly(dtype, monkeypatch):
    ratios = []

    def watched(logprobs, old, *rest):
        losses, ratio = policy_losses(logprobs, old, *rest)
        ratios.append(ratio.detach())
        return losses, ratio

    monkeypatch.setattr(train_ppo, "policy_losses", watched)
    first = next(r for r in records(fit(dtype=dtype, max_iters=1)) if "kl" in r)
    assert first["kl"] == 0
    assert (ratios[0] == 1).all()
    assert len(ratios) == 2 * 8 // 4 and (ratios[1] != 1).any()


def test_a_reply_that_does_not_end_or_goes_on_with_another_turn_has_not_ended(monkeypatch):
    ids = [
        TOKENIZER.encode(" fine"),
        TOKENIZER.encode(" ok\n[Human]: hi"),
        TOKENIZER.encode(" a b c d e f g h")[:8],
    ]
    monkeypatch.setattr(train_ppo, "generate", lambda *_, **__: ids)
    rollout = roll_out(None, TOKENIZER, [[1]] * 3, train_ppo.Config(max_new_tokens=8), 0)
    assert rollout.ended.tolist() == [True, False, False]
    assert [reply[-1] == TOKENIZER.eos_id for reply in rollout.replies] == [True, True, False]
    theirs = Tokenizer("user_assistant")
    ids = [
        theirs.encode("fine"),
        [*theirs.encode("fine"), theirs.special_ids["<|USER|>"]],
        [theirs.pad_id],
    ]
    rollout = roll_out(None, theirs, [[1]] * 3, train_ppo.Config(max_new_tokens=8), 0)
    assert rollout.ended.tolist() == [True, False, False]


# ---- rewards


def test_toy_rewards_by_hand():
    end = TOKENIZER.eos_id
    tea = [*TOKENIZER.encode(" tea tea now"), end]
    rollout = Rollout([[1]] * 3, [tea, [*TOKENIZER.encode("tea"), end], [end]], None)
    share = make_reward("share:tea", TOKENIZER, "cpu", torch.no_grad())(rollout)
    assert share.tolist() == pytest.approx([2 / 3, 1, 0])
    length = make_reward("length:2", TOKENIZER, "cpu", torch.no_grad())(rollout)
    assert length.tolist() == pytest.approx(
        [1 - 1 / 2, 1 - (1 - len(TOKENIZER.encode("tea")) / 2), 0]
    )


def test_a_learned_reward_is_the_models_score_of_the_whole_without_its_end():
    judge, _ = load_model("reward", model_class=RewardModel)
    rollout = Rollout([[5, 6, 7]], [[8, 9, TOKENIZER.eos_id]], None)
    found = make_reward("reward", TOKENIZER, "cpu", torch.no_grad())(rollout)
    expected = judge.eval()(torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([5]))
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)
    assert torch.equal(found, scores(judge, [scored(rollout.rows()[0], TOKENIZER, 128)]))


# ---- runs


def without_times(out):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(out)]


@pytest.mark.parametrize("reward", ["length:4", "reward"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(reward, monkeypatch):
    whole = fit(out_dir="whole", reward=reward)
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "StopSignal", lambda: StopsAfter(3))
        halves = fit(out_dir="halves", reward=reward)
    assert torch.load(halves / "last" / "state.pt", weights_only=True)["iter"] == 3
    fit(out_dir="halves", reward=reward, init_from="resume")
    assert_same_weights(whole / "last", halves / "last")
    assert without_times(whole) == without_times(halves)


def test_two_processes_are_one_process():
    knobs = {"max_iters": 2, "epochs": 1, "batch_size": 8, "out_dir": "two"}
    whole = fit(**knobs | {"out_dir": "one"})
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    knobs = [f"--{name}={value}" for name, value in (TINY | knobs).items()]
    done = subprocess.run(
        [*run, ROOT / "train_ppo.py", *knobs], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ones, twos = without_times(whole), without_times(Path("two"))
    for one, two in zip(ones, twos, strict=True):
        assert one == pytest.approx(two, abs=1e-3, rel=1e-2)


def test_the_log_has_what_is_to_be_watched(capsys):
    out = fit()
    steps = [r for r in records(out) if "reward" in r]
    evaluations = [r for r in records(out) if "val_reward" in r]
    names = {
        "reward",
        "score",
        "kl",
        "kl_coef",
        "entropy",
        "clip_fraction",
        "explained_variance",
        "length",
        "ended",
    }
    assert all(names <= step.keys() for step in steps) and len(steps) == 4
    assert [r["iter"] for r in evaluations] == [0, 2, 4]
    assert (evaluations[0]["val_kl"], steps[0]["kl"]) == (0, 0)
    shown = capsys.readouterr().out
    assert (
        sum(line.startswith("  ") and " -> " in line for line in shown.splitlines()) == 4
    )  # a sample a step
    best = max(r["val_score"] for r in evaluations)
    assert f"the best held-out score is {best:+.2f}" in shown


def test_what_it_wrote_talks(script):
    fit(max_iters=1)
    done = script("chat.py", "--init_from=out", "--max_new_tokens=20", input="hi\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Bot:")


def test_the_weights_of_the_highest_held_out_score_are_kept(monkeypatch):
    saved, save = [], train_ppo.save_model
    for module in (train_ppo, training):
        monkeypatch.setattr(
            module, "save_model", lambda *args: (saved.append(str(args[2])), save(*args))
        )
    gains = iter([0.5, 0.7, 0.6, 0.9, 0.6, 0.8])
    monkeypatch.setattr(
        train_ppo, "make_reward", lambda *_: lambda r: torch.full((len(r.replies),), next(gains))
    )
    fit(
        max_iters=2, eval_interval=1, epochs=1
    )  # rewards: at the start, held out, of a step, held out, ...
    assert saved == ["out/reference", "out", "out/last", "out", "out/last", "out/last"]


@pytest.mark.parametrize("eval_interval", [1, 5])
def test_a_kl_that_runs_away_ends_the_run_before_anything_is_saved_over(eval_interval):
    start = load_file("start/model.safetensors")
    with pytest.raises(
        ValueError, match=r"runs away\. Lower learning_rate.*the checkpoints are from before"
    ):
        fit(learning_rate=0.3, kl_target=0.01, max_iters=20, eval_interval=eval_interval)
    for folder in ("out", "out/last"):
        saved = load_file(f"{folder}/model.safetensors")
        assert all(torch.equal(start[name], saved[name]) for name in start)


def test_a_kl_coefficient_that_is_given_anew_counts_when_a_run_is_resumed():
    fit(max_iters=1)
    fit(max_iters=2, init_from="resume")
    fit(max_iters=3, init_from="resume", kl_coef=0.5)
    found = [r["kl_coef"] for r in records(Path("out")) if "kl_coef" in r]
    assert (
        found[0] == 0.15
        and found[1] == pytest.approx(0.15, rel=0.01)
        and found[1] != 0.15
        and found[2] == 0.5
    )


@pytest.mark.parametrize(
    "knob", [{"reward": "length:3"}, {"temperature": 0.5}, {"max_new_tokens": 7}]
)
def test_a_run_is_resumed_for_what_it_was_begun(knob):
    fit(max_iters=1)
    (name, value), *_ = knob.items()
    with pytest.raises(
        ValueError, match=f"{name}={value}, but the run in out is for {TINY.get(name, 0.7)}"
    ):
        fit(init_from="resume", **knob)


def test_a_run_of_another_script_is_not_resumed():
    fit(max_iters=1)
    for script in (train_reward, train):
        with pytest.raises(ValueError, match=r"out/last is a run of train_ppo\.py"):
            script.main(
                script.Config(out_dir="out", init_from="resume", device="cpu", dataset="talk")
            )


# ---- rewards whose best is known: the full runs are in the README


def test_it_learns_to_stop_where_it_is_paid_for_and_stays_within_the_kl():
    knobs = {
        "rollouts": 32,
        "batch_size": 16,
        "epochs": 4,
        "max_iters": 25,
        "learning_rate": 3e-3,
        "eval_replies": 64,
    }
    out = fit(
        **knobs, reward="length:4", eval_interval=25, normalize_on=64, kl_target=20.0, kl_coef=0.02
    )
    before, after = (r for r in records(out) if "val_reward" in r)
    assert before["val_reward"] < 0.2 and after["val_reward"] > 0.5
    assert 0 < after["val_kl"] < 20
    assert 2.5 < after["val_length"] < 6  # 5 with its end


def test_a_config_for_the_model_in_the_box_runs(monkeypatch):
    write_shards("data/personachat", small_talk(20), small_talk(10))
    save_model(RewardModel(GPTConfig(256, **SHAPE)), TOKENIZER, "out/reward")
    given = [
        "--rollouts=4",
        "--batch_size=2",
        "--max_iters=1",
        "--normalize_on=4",
        "--eval_replies=4",
        "--epochs=1",
    ]
    train_ppo.main(
        parse(train_ppo.Config, [str(ROOT / "config" / "ppo_nano.py"), *given, "--device=cpu"])
    )
    assert [r["iter"] for r in records(Path("out/ppo"))] == [0, 1, 1]


# ---- refusals


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"reward": "start"}, ["start", "is no reward model"]),
        ({"reward": "share:"}, ["reward=share: is neither"]),
        ({"reward": "length:no"}, ["reward=length:no is neither"]),
        ({"reward": "length:0"}, ["reward=length:0 is neither"]),
        (
            {"reward": "nowhere"},
            ["reward=nowhere: ", "there is no such directory", "train_reward.py"],
        ),
        ({"reward": "other"}, ["another vocabulary"]),
        ({"init_from": "resume"}, ["out/last/state.pt to resume from"]),
        ({"init_from": "reward"}, ["is a reward model"]),
        ({"rollouts": 6}, ["rollouts=6 is not a multiple of batch_size=4"]),
        ({"temperature": 0.0}, ["temperature=0.0 is not above 0"]),
        ({"max_prompt": 125}, ["the model's context is 128"]),
        ({"max_prompt": 1}, ["has a prompt of at most 1 tokens: raise max_prompt"]),
        ({"dataset": "nowhere"}, ["no data/nowhere/train*.bin"]),
        ({"dataset": "theirs"}, ["is in template user_assistant"]),
        ({"gamma": 5.0}, ["gamma=5.0 is not from 0 to 1"]),
        ({"no_end": math.nan}, ["no_end=nan"]),
        ({"kl_horizon": 7}, ["kl_horizon=7 is less than"]),
        ({"lr_schedule": "step"}, ["lr_schedule=step"]),
        ({"eval_replies": 1}, ["eval_replies=1"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused_in_a_sentence(knobs, words):
    theirs = Tokenizer("user_assistant")
    write_shards("data/theirs", small_talk(10), small_talk(5), "user_assistant")
    save_model(RewardModel(GPTConfig(128, theirs.n_vocab, **SHAPE)), theirs, "other")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        fit(**knobs)
    for word in words:
        assert word in str(refused.value)


def test_a_mistake_ends_in_a_sentence_and_status_2(script):
    assert_refused(script("train_ppo.py", "--init_from=start", "--dataset=talk"), "out/reward")
