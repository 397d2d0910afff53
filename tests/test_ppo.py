"""PPO: its formulas by hand, its first step, resuming, toy rewards, and what it refuses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, StopsAfter, assert_same_weights, records, small_talk, write_shards
from forked import two_ranks

import train
import train_ppo
import train_reward
from model import GPT, GPTConfig
from nanochatgpt import resume
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import parse
from nanochatgpt.distributed import Distributed
from nanochatgpt.tokenizer import Tokenizer
from rlhf.ppo import (
    ActorCritic,
    Rollout,
    adapted_kl_coef,
    advantages_and_returns,
    make_reward,
    policy_losses,
    reply_means,
    roll_out,
    token_rewards,
    value_losses,
    whiten,
)
from rlhf.reward_model import RewardModel
from rlhf.scoring import score_texts

TOKENIZER = Tokenizer()
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16}
TINY = {"init_from": "start", "reward": "length:4", "out_dir": "out", "dataset": "talk"}
TINY |= {"device": "cpu", "dtype": "float32", "rollouts": 8, "batch_size": 4, "max_new_tokens": 8}
TINY |= {"max_prompt": 64, "epochs": 2, "max_iters": 4, "eval_interval": 2, "eval_replies": 8}
TINY |= {"learning_rate": 1e-3}
ALONE = Distributed(0, 1, "cpu", None)


def model(std=0.6):
    """Return a GPT with far from flat distributions, which ends replies sooner or later."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(128, **SHAPE)).eval()
    with torch.no_grad():
        gpt.transformer.wte.weight.normal_(std=std)
        gpt.transformer.ln_f.bias.normal_(std=0.5)
        gpt.transformer.wte.weight[TOKENIZER.eos_id] = 2 * gpt.transformer.ln_f.bias
    return gpt


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with the dataset `talk`, a GPT to start from and a reward model."""
    home = tmp_path_factory.mktemp("ppo")
    write_shards(home / "data" / "talk", small_talk(60, seed=1), small_talk(10, seed=2))
    save_model(model(), TOKENIZER, home / "start")
    torch.manual_seed(1)
    save_model(RewardModel(GPTConfig(128, **SHAPE)), TOKENIZER, home / "reward")
    return home


@pytest.fixture(autouse=True)
def folder(tmp_path, shared, monkeypatch):
    """The current folder, with what is shared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(train_ppo, "NORMALIZE_ON", 8)
    Path("data").mkdir()
    for name in ("data/talk", "start", "reward"):
        Path(name).symlink_to(shared / name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def fit(**knobs):
    config = train_ppo.Config(**TINY | knobs)
    train_ppo.main(config)
    return Path(config.out_dir)


def steps_of(out):
    return [record for record in records(out) if "reward" in record]


def evaluations(out):
    return [record for record in records(out) if "val_reward" in record]


def without_times(out):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(out)]


# ---- formulas


def test_advantages_by_hand():
    # two replies of three tokens and of one; lambda 0.25
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 0.25], [1.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    third = 2 - 0.25
    second = (0 + 0.25 - 1) + 0.25 * third
    first = (1 + 1 - 0.5) + 0.25 * second
    advantages, returns = advantages_and_returns(rewards, values, mask, 0.25)
    torch.testing.assert_close(advantages, torch.tensor([[first, second, third], [2.0, 0.0, 0.0]]))
    expected = torch.tensor([[first + 0.5, second + 1, 2.0], [3.0, 0.0, 0.0]])
    torch.testing.assert_close(returns, expected)


def test_with_lambda_1_returns_are_sums_of_rewards_to_come():
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 9, generator=draw)
    values = torch.randn(5, 9, generator=draw)
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 6, 2])[:, None]
    _, returns = advantages_and_returns(rewards * mask, values, mask, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_come, atol=1e-5, rtol=0)


def test_whitening_looks_at_reply_tokens_only():
    x = torch.tensor([[1.0, 2.0, 100.0], [3.0, 6.0, -100.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    numbers = np.array([1.0, 2.0, 3.0, 6.0])
    expected = (numbers - numbers.mean()) / numbers.std()
    white = whiten(x, mask, ALONE)
    assert white[mask].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert (white[~mask] == 0).all()


def test_a_token_costs_its_kl_and_the_last_one_earns_the_score():
    rollout = Rollout([[1], [1]], [[5, 6, 7], [8]], None)
    rollout.score = torch.tensor([2.0, -1.0])
    rollout.kl = torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.0, 0.0]])
    rewards = token_rewards(rollout, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 2.0], [-1.2, 0.0, 0.0]]))


def test_means_are_over_replies():
    rollout = Rollout([[1], [1]], [[5, 6, 7], [8]], torch.tensor([True, False]))
    rollout.rewards = torch.tensor([1.0, 2.0])
    rollout.score = torch.tensor([0.5, -1.0])
    rollout.kl = torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.0, 0.0]])
    expected = {"reward": 1.5, "score": -0.25, "kl": 0.75, "length": 2, "ended": 0.5}
    assert reply_means(rollout, ALONE) == expected


def test_losses_by_hand():
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    # a ratio that moved as the advantage wants gains nothing more beyond the clip
    losses = policy_losses(ratio, advantages, 0.2)
    assert losses.tolist() == pytest.approx([-2.0, -1.2, 1.5, -0.5, 0.8])
    values = torch.tensor([1.0, 1.0, 0.05])
    old_values = torch.tensor([0.0, 2.0, 0.0])
    losses = value_losses(values, old_values, torch.tensor([1.0, 3.0, 1.0]), 0.2)
    assert losses.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 2**2, 0.5 * 0.95**2])


def test_the_kl_coefficient_rises_above_the_target_and_falls_below():
    config = train_ppo.Config(kl_target=6.0, rollouts=100, batch_size=10, kl_horizon=1000)
    assert adapted_kl_coef(0.1, 6.6, config) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapted_kl_coef(0.1, 60.0, config) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adapted_kl_coef(0.1, 0.0, config) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


# ---- the distribution


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probabilities_are_of_the_distribution_that_was_drawn_from(temperature):
    """Among many replies of one token, each is as frequent as its probability says."""
    policy = model(std=1.0)
    config = train_ppo.Config(max_new_tokens=1, temperature=temperature)
    prompt = TOKENIZER.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)[0]
    rollout = roll_out(policy, TOKENIZER, [prompt] * 500, config, seed=0)
    drawn = np.array([reply[0] for reply in rollout.replies])
    common, counts = np.unique(drawn, return_counts=True)
    critic = ActorCritic(policy, TOKENIZER.n_vocab, temperature)
    for token in common[counts.argsort()[-5:]].tolist():
        tokens = Rollout([prompt], [[token]], None).minibatch(torch.tensor([0]), "cpu")
        p = critic(*tokens)[0].exp().item()
        share = (drawn == token).mean()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 500) and p > 0.001


def test_log_probabilities_and_values_are_those_of_each_token():
    policy = model()
    critic = ActorCritic(policy, 50000, 0.7)  # as if the tokenizer had fewer tokens than the model
    with torch.no_grad():
        critic.value.weight.normal_()
    rollout = Rollout([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], None)
    expected = []
    for b in (1, 0):
        for n, token in enumerate(rollout.replies[b]):
            before = torch.tensor([rollout.prompts[b] + rollout.replies[b][:n]])
            logits = policy(before)[0][0, -1, :50000] / 0.7
            distribution = torch.distributions.Categorical(logits=logits)
            value = policy.hidden(before)[0, -1] @ critic.value.weight[0]
            expected += [distribution.log_prob(torch.tensor(token)), value]
    tokens = torch.stack(critic(*rollout.minibatch(torch.tensor([1, 0]), "cpu")), 1)
    torch.testing.assert_close(tokens.flatten(), torch.stack(expected), atol=1e-4, rtol=1e-4)
    logprobs, values = critic.evaluate(rollout, 1, torch.no_grad())
    for row, tokens_of_reply in ((1, tokens[:3]), (0, tokens[3:])):
        n = len(tokens_of_reply)
        torch.testing.assert_close(logprobs[row, :n], tokens_of_reply[:, 0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values[row, :n], tokens_of_reply[:, 1], atol=1e-4, rtol=1e-4)
    assert logprobs[0, 2] == values[0, 2] == 0


def test_values_are_0_at_the_start():
    critic = ActorCritic(model(), TOKENIZER.n_vocab, 1.0)
    _, values = critic.evaluate(Rollout([[5]], [[6, 7]], None), 1, torch.no_grad())
    assert (values == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratios_are_exactly_1_and_the_first_kl_is_0(dtype, monkeypatch):
    ratios = []

    def watched(ratio, *rest):
        ratios.append(ratio.detach())
        return policy_losses(ratio, *rest)

    monkeypatch.setattr("rlhf.ppo.policy_losses", watched)
    assert steps_of(fit(dtype=dtype, max_iters=1))[0]["kl"] == 0
    assert (ratios[0] == 1).all()
    assert len(ratios) == 2 * 8 // 4 and (ratios[1] != 1).any()


def test_a_reply_has_not_ended_if_it_is_cut_or_goes_on_with_another_turn(monkeypatch):
    other = Tokenizer("user_assistant")
    config = train_ppo.Config(max_new_tokens=8)
    for tokenizer, replies, ended in (
        (
            TOKENIZER,
            [
                TOKENIZER.encode(" fine"),
                TOKENIZER.encode(" ok\n[Human]: hi"),
                TOKENIZER.encode(" a b c d e f g h")[:8],
            ],
            [True, False, False],
        ),
        (
            other,
            [other.encode("ok"), [*other.encode("ok"), other.special_ids["<|USER|>"]]],
            [True, False],
        ),
    ):
        whole = [len(ids) < 8 for ids in replies]
        monkeypatch.setattr("rlhf.ppo.generate", lambda *_, replies=replies, **__: replies)
        rollout = roll_out(None, tokenizer, [[1]] * len(replies), config, 0)
        assert rollout.ended.tolist() == ended
        assert [reply[-1] == tokenizer.eos_id for reply in rollout.replies] == whole


# ---- rewards


def test_the_toy_reward_by_hand():
    end = TOKENIZER.eos_id
    rollout = Rollout([[1]] * 3, [[5, 6, 7, end], [5], [end]], None)
    reward = make_reward("length:2", TOKENIZER, "cpu", torch.no_grad())
    assert reward(rollout).tolist() == pytest.approx([1 / 2, 1 / 2, 0])


def test_a_learned_reward_is_the_score_of_the_text_without_its_end():
    judge, _ = load_model("reward", model_class=RewardModel)
    rollout = Rollout([[5, 6, 7]], [[8, 9, TOKENIZER.eos_id]], None)
    rewards = make_reward("reward", TOKENIZER, "cpu", torch.no_grad())(rollout)
    expected = judge.eval()(torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([5]))
    torch.testing.assert_close(rewards, expected.detach(), atol=1e-5, rtol=0)
    texts = [[5, 6, 7, 8, 9, TOKENIZER.eos_id]]
    assert torch.equal(rewards, score_texts(judge, TOKENIZER, texts))


# ---- runs


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(monkeypatch):
    knobs = {"reward": "reward", "max_iters": 3}
    whole = fit(out_dir="whole", **knobs)
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "StopSignal", lambda: StopsAfter(1))
        halves = fit(out_dir="halves", **knobs)
    assert torch.load(halves / "last" / "state.pt", weights_only=True)["iter"] == 1
    fit(out_dir="halves", init_from="resume", **knobs)
    assert_same_weights(whole / "last", halves / "last")
    assert without_times(whole) == without_times(halves)


def test_two_processes_are_one_process():
    knobs = {"max_iters": 2, "epochs": 1, "batch_size": 8}
    one = fit(**knobs, out_dir="one")
    program = f"import sys; sys.path[0] = {str(ROOT)!r}; import train_ppo; "
    program += "train_ppo.NORMALIZE_ON = 8; train_ppo.run(train_ppo.main, train_ppo.Config)"
    arguments = [f"--{name}={value}" for name, value in (TINY | knobs | {"out_dir": "two"}).items()]
    done = [rank.wait() for rank in two_ranks(["-c", program, *arguments], Path.cwd())]
    assert [each.returncode for each in done] == [0, 0], done
    for first, second in zip(without_times(one), without_times("two"), strict=True):
        assert first == pytest.approx(second, abs=1e-3, rel=1e-2)


def test_the_log_and_a_policy_that_talks(capsys, as_main):
    out = fit()
    steps = steps_of(out)
    names = {"reward", "score", "kl", "length", "ended", "loss", "kl_coef", "lr", "seconds"}
    assert all(names <= step.keys() for step in steps) and len(steps) == 4
    assert [record["iter"] for record in evaluations(out)] == [0, 2, 4]
    assert (evaluations(out)[0]["val_kl"], steps[0]["kl"]) == (0, 0)
    printed = capsys.readouterr().out
    samples = [line for line in printed.splitlines() if line.startswith("  ")]
    assert len(samples) == 4  # one per iteration
    best = max(record["val_score"] for record in evaluations(out))
    assert f"best held-out score {best:+.2f}" in printed

    done = as_main("chat.py", "--init_from=out", "--max_new_tokens=20", input="hi\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Bot:")


def test_a_reward_that_is_the_same_for_all_replies_is_a_warning_and_no_division(capsys):
    constant = RewardModel(GPTConfig(128, **SHAPE))
    torch.nn.init.zeros_(constant.score.weight)
    save_model(constant, TOKENIZER, "constant")
    out = fit(reward="constant")
    assert "constant" in capsys.readouterr().err
    for step in steps_of(out):
        assert step["reward"] == 0 and -1 <= step["score"] <= 0  # without an end it is -1


def test_the_weights_of_the_highest_held_out_score_are_kept(monkeypatch):
    saved = []
    for module in (train_ppo, resume):
        monkeypatch.setattr(module, "save_model", lambda *args: saved.append(str(args[2])))
    # at the start, then held out and of an iteration in turn
    rewards = iter([0.5, 0.7, 0.6, 0.9, 0.6, 0.8])

    def reward(rollout):
        rollout.ended[:] = True
        return torch.full((len(rollout.replies),), next(rewards))

    monkeypatch.setattr("rlhf.ppo.make_reward", lambda *_: reward)
    Path("out/last").mkdir(parents=True)
    fit(max_iters=2, eval_interval=1, epochs=1)
    assert saved == ["out/reference", "out", "out/last", "out", "out/last", "out/last"]


@pytest.mark.parametrize("eval_interval", [1, 5])
def test_a_runaway_kl_ends_the_run_before_its_checkpoints_are_overwritten(eval_interval):
    with pytest.raises(ValueError, match="KL"):
        fit(learning_rate=0.3, kl_target=0.01, max_iters=20, eval_interval=eval_interval)
    for folder in ("out", "out/last"):
        assert_same_weights("start", folder)


def test_a_resumed_run_goes_on_with_the_adapted_kl_coef():
    fit(max_iters=1)
    fit(max_iters=2, init_from="resume", kl_coef=0.5)
    first, second = (step["kl_coef"] for step in steps_of("out"))
    assert first == 0.15
    assert second == pytest.approx(0.15, rel=0.01) and second != 0.15


def test_a_run_resumes_with_its_own_reward_and_script_only():
    fit(max_iters=1)
    for name, value in (("reward", "length:3"), ("temperature", 0.5), ("max_new_tokens", 7)):
        with pytest.raises(ValueError, match=f"{name}={value}.*{TINY.get(name, 0.7)}"):
            fit(init_from="resume", **{name: value})
    knobs = {"out_dir": "out", "init_from": "resume", "device": "cpu", "dataset": "talk"}
    for script in (train_reward, train):
        with pytest.raises(ValueError, match=r"out/last.*train_ppo\.py"):
            script.main(script.Config(**knobs))


def test_it_learns_to_stop_where_it_is_paid_for_and_stays_within_the_kl(monkeypatch):
    monkeypatch.setattr(train_ppo, "NORMALIZE_ON", 32)
    knobs = {"rollouts": 16, "batch_size": 16, "epochs": 4, "max_iters": 6, "eval_interval": 6}
    out = fit(**knobs, learning_rate=1e-2, eval_replies=16, kl_target=20.0, kl_coef=0.02)
    before, after = evaluations(out)
    assert before["val_reward"] < 0.2 and after["val_reward"] > 0.35
    assert 0 < after["val_kl"] < 20
    assert 2.5 < after["val_length"] < before["val_length"]  # 4 and its end


def test_the_config_for_the_model_in_the_box_runs():
    Path("data/personachat").symlink_to(Path("data/talk").resolve())
    save_model(RewardModel(GPTConfig(256, **SHAPE)), TOKENIZER, "out/reward")
    knobs = ["--rollouts=4", "--batch_size=2", "--max_iters=1", "--eval_replies=4", "--epochs=1"]
    config = ROOT / "config" / "ppo_nano.py"
    train_ppo.main(parse(train_ppo.Config, [str(config), *knobs, "--device=cpu"]))
    assert [record["iter"] for record in records("out/ppo")] == [0, 1, 1]


# ---- refusals


@pytest.mark.parametrize(
    ("knobs", "names"),
    [
        ({"reward": "start"}, ["reward=start"]),
        ({"reward": "length:no"}, ["reward=length:no"]),
        ({"reward": "length:0"}, ["reward=length:0"]),
        ({"reward": "nowhere"}, ["reward=nowhere", "train_reward.py"]),
        ({"reward": "other"}, ["reward=other", "user_assistant"]),
        ({"init_from": "resume"}, ["out/last/state.pt"]),
        ({"init_from": "reward"}, ["reward model"]),
        ({"rollouts": 6}, ["rollouts=6", "batch_size=4"]),
        ({"temperature": 0.0}, ["temperature=0.0"]),
        ({"max_prompt": 125}, ["max_prompt", "128"]),
        ({"max_prompt": 1}, ["max_prompt=1"]),
        ({"dataset": "nowhere"}, ["data/nowhere/train*.bin"]),
        ({"dataset": "theirs"}, ["user_assistant"]),
        ({"lam": -1.0}, ["lam=-1.0"]),
        ({"eval_replies": 0}, ["eval_replies=0"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_refused_by_name(knobs, names):
    if "theirs" in knobs.values():
        write_shards("data/theirs", small_talk(10), small_talk(5), "user_assistant")
    if "other" in knobs.values():
        other = Tokenizer("user_assistant")
        save_model(RewardModel(GPTConfig(128, other.n_vocab, **SHAPE)), other, "other")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        fit(**knobs)
    for name in names:
        assert name in str(refused.value)
