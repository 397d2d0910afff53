"""Best of N: the engine draws candidates, the reward model scores them, the best one is said."""

import io
import itertools
from pathlib import Path

import pytest
import torch

import chat
from model import GPT, GPTConfig
from nanochatgpt import engine
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.engine import Engine
from nanochatgpt.generate import generate
from nanochatgpt.sampling import Sampling
from nanochatgpt.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel
from rlhf.scoring import best_of, score_texts

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}
HI = [{"role": "user", "content": "hi there, how are you today?"}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a GPT, and a reward model whose scores differ widely, in each template."""
    home = tmp_path_factory.mktemp("best_of")
    for template in ("human_bot", "user_assistant"):
        tokenizer = Tokenizer(template)
        torch.manual_seed(0)
        policy = GPT(GPTConfig(128, tokenizer.n_vocab, **SHAPE))
        save_model(policy, tokenizer, home / f"gpt-{template}")
        reward_model = RewardModel(GPTConfig(96, tokenizer.n_vocab, **SHAPE))
        with torch.no_grad():
            reward_model.score.weight.normal_()
        save_model(reward_model, tokenizer, home / f"reward-{template}")
    return home


@pytest.fixture(autouse=True)
def folder(tmp_path, shared, monkeypatch):
    """The current folder, with what is shared."""
    monkeypatch.chdir(tmp_path)
    for path in shared.iterdir():
        Path(path.name).symlink_to(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def loaded(template="human_bot"):
    policy, tokenizer = load_model(f"gpt-{template}")
    reward_model, _ = load_model(f"reward-{template}", model_class=RewardModel)
    return policy, reward_model.eval(), tokenizer


def knobs(**given):
    options = {"init_from": "gpt-human_bot", "reward": "reward-human_bot", "best_of": 4}
    options |= {"device": "cpu", "dtype": "float32", "max_new_tokens": 12, "seed": 3}
    return chat.Config(**options | {"temperature": 1.0, "top_p": 1.0} | given)


@pytest.mark.parametrize("template", ["human_bot", "user_assistant"])
def test_candidates_are_drawn_as_one_by_one_and_have_the_scores_of_whole_texts(template):
    policy, reward_model, tokenizer = loaded(template)
    prompt, _ = tokenizer.render(HI, add_generation_prompt=True)
    best = best_of(Engine(policy, 4), reward_model, tokenizer, prompt, 4, Sampling(12), seed=5)
    options = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
    alone = []
    for i in range(4):
        options["seed"] = 5 + i
        alone += generate(policy, [prompt], Sampling(12), tokenizer=tokenizer, **options)
    assert sorted(ids for _, ids in best) == sorted(alone)
    assert len({tuple(ids) for ids in alone}) == 4
    texts = [prompt + ids + [tokenizer.eos_id] for _, ids in best]  # as training sees them
    expected = score_texts(reward_model, tokenizer, texts)
    assert [score for score, _ in best] == pytest.approx(expected.tolist(), abs=1e-4)
    assert all(a >= b for (a, _), (b, _) in itertools.pairwise(best))


def test_the_prompt_is_computed_once_by_the_policy_and_once_by_the_reward_model(monkeypatch):
    policy, reward_model, tokenizer = loaded()
    prompt, _ = tokenizer.render(HI * 3, add_generation_prompt=True)
    computed = {"policy": 0, "reward": 0}

    def count(name, model):
        hidden = model.hidden

        def counted(idx, **rest):
            computed[name] += idx.numel()
            return hidden(idx, **rest)

        monkeypatch.setattr(model, "hidden", counted)

    count("policy", policy)
    count("reward", reward_model)
    engine = Engine(policy, 8, record=False)
    best = best_of(engine, reward_model, tokenizer, prompt, 8, Sampling(6), seed=0)
    new = sum(len(ids) for _, ids in best)
    assert computed["reward"] == len(prompt) - 1 + 8 + new  # its last token begins each branch
    assert len(prompt) + new - 8 <= computed["policy"] <= len(prompt) + 8 + new


def test_the_best_reply_is_said_and_the_next_turn_goes_on_from_it():
    talk = chat.Chat(knobs())
    for message in ("hi", "and you?"):
        said = "".join(talk.reply(message))
        assert talk.messages[-1] == {"role": "assistant", "content": said}
        assert len(talk.choice) == 4
        assert said == talk.choice[0][1].strip()
        assert talk.choice == sorted(talk.choice, key=lambda pair: -pair[0])
    again = chat.Chat(knobs())
    assert "".join(again.reply("hi")) == talk.messages[1]["content"]  # the seed decides


def test_a_higher_best_of_finds_no_worse_replies():
    totals = []
    for n in (2, 16):
        talk = chat.Chat(knobs(best_of=n))
        totals.append(0)
        for message in ("hi", "and you?", "what now?"):
            list(talk.reply(message))
            totals[-1] += talk.choice[0][0]
            talk.turns = []
    assert totals[1] > totals[0]


def test_why_shows_the_candidates(capsys):
    talk = chat.Chat(knobs())
    chat.command(talk, "/why")
    assert "no candidates to show" in capsys.readouterr().out
    list(talk.reply("hi"))
    capsys.readouterr()
    chat.command(talk, "/why")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert [float(line.split()[0]) for line in lines] == pytest.approx(
        [s for s, _ in talk.choice], abs=1e-3
    )
    talk.choice *= 2
    chat.command(talk, "/why")
    assert capsys.readouterr().out.count("(2 times)") == 4  # equal ones on one line
    assert " ".join(talk.choice[0][1].split()) in lines[0]
    chat.command(talk, "/reset")
    chat.command(talk, "/why")
    assert "no candidates to show" in capsys.readouterr().out


def test_retry_gives_another_reply_than_those_that_were_taken_back():
    talk = chat.Chat(
        knobs(best_of=8, max_new_tokens=1, top_k=3, temperature=2.0)
    )  # few different ones
    said = []
    for _ in range(3):
        list(talk.reply("hi"))
        said.append(talk.messages[-1]["content"])
        talk.take_back()
    assert len({text for text in said if text}) == len([text for text in said if text]) >= 2


def test_a_retry_that_is_cut_short_leaves_the_reply_that_was_there(monkeypatch, tmp_path):
    talk = chat.Chat(knobs())
    list(talk.reply("hi"))
    before = [dict(m) for m in talk.messages]
    message = chat.command(talk, "/retry")
    assert message == "hi" and talk.messages == []

    def interrupted(engine):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talk.reply(message))
    talk.cut_short()
    assert talk.messages == before and talk.retried == []
    with monkeypatch.context() as patch:  # of a message that is new nothing is left
        patch.setattr(Engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talk.reply("and you?"))
    talk.cut_short()
    assert talk.messages == before


def test_an_answer_that_was_cut_short_leaves_the_engine_free(monkeypatch):
    talk = chat.Chat(knobs())
    step, calls = Engine.step, itertools.count()

    def interrupted(engine):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(talk.reply("hi"))
    assert talk.engine.running == []
    talk.take_back()
    assert "".join(talk.reply("hi")) == talk.messages[-1]["content"]


def test_piped_messages_are_answered_too(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\nhow are you\n")))
    chat.main(knobs())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("Bot:") for line in lines)


def test_a_reply_that_is_cut_for_its_length_has_no_part_of_a_marker(monkeypatch):
    policy, _, tokenizer = loaded()
    ids = tokenizer.encode(" ok\n[Human")
    for room, expected in (
        (len(ids), " ok\n"),
        (len(ids) + 1, " ok\n[Human"),
    ):  # or it ended by itself
        script = iter([*ids, tokenizer.eos_id])
        monkeypatch.setattr(
            engine, "draw_token", lambda *_, script=script: torch.tensor([next(script)])
        )
        stops = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
        [found] = generate(policy, [[1]], Sampling(room), tokenizer=tokenizer, **stops)
        assert tokenizer.decode(found) == expected


def test_rows_that_run_are_not_stepped_for_somebody_else():
    policy, reward_model, tokenizer = loaded()
    busy = Engine(policy, 4)
    busy.add([1, 2], Sampling())
    with pytest.raises(ValueError, match="1 rows of the engine are running"):
        best_of(busy, reward_model, tokenizer, [1, 2], 2, Sampling())


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"reward": ""}, ["best_of=4", "reward"]),
        ({"best_of": 1}, ["best_of=1", "reward-human_bot"]),
        ({"best_of": 0, "reward": ""}, ["best_of=0"]),
        ({"reward": "gpt-human_bot"}, ["reward=gpt-human_bot"]),
        ({"reward": "reward-user_assistant"}, ["reward-user_assistant", "human_bot"]),
        ({"reward": "nowhere"}, ["reward=nowhere", "train_reward.py"]),
    ],
    ids=str,
)
def test_mistakes_are_refused_by_name(given, names):
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        chat.Chat(knobs(**given))
    for name in names:
        assert name in str(refused.value)
