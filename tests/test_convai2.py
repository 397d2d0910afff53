"""ConvAI2's metrics against brute force and counts by hand; the first batches of fine-tuning
against a training loop."""

import json
import math
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, small_talk, write_shards

from evaluation import convai2, first_batches
from evaluation.metrics import f1, predict
from evaluation.ranking import loglikelihoods
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import run
from nanochatgpt.loader import Loader
from nanochatgpt.shards import find_shards
from nanochatgpt.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
DIALOGS = """\
1 your persona: i like tea.
2 your persona: i have a dog.
3 hi there\thello , how are you ?\t\ti am a cook .|no .|hello , how are you ?
4 fine . and you ?\ti drink tea .\t\tyes .|hello , how are you ?|i drink tea .
1 your persona: i am old.
2 __SILENCE__\tgood morning .\t\tno .|hello , how are you ?|good morning .
"""


@pytest.fixture
def valid(tmp_path):
    path = tmp_path / "valid_self_original.txt"
    path.write_text(DIALOGS)
    return path


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        p.data *= 4  # so that scores differ
    return model


def test_a_line_is_the_persona_the_messages_the_reply_and_its_candidates(valid):
    first, second, third = convai2.examples(valid)
    assert first == (
        "i like tea. i have a dog.",
        [{"role": "user", "content": "hi there"}],
        "hello , how are you ?",
        ["i am a cook .", "no .", "hello , how are you ?"],
    )
    texts = [message["content"] for message in second[1]]
    assert texts == ["hi there", "hello , how are you ?", "fine . and you ?"]
    assert third[:3] == ("i am old.", [], "good morning .")  # __SILENCE__ is no message
    assert len(convai2.examples(valid, max_dialogs=1)) == 2


@pytest.mark.parametrize(
    ("reply", "reference", "score"),
    [
        ("I like the tea.", "i like tea", 1.0),  # case, punctuation and articles do not count
        ("i like tea", "i like my dog", 2 * 2 / (3 + 4)),  # i, like
        ("tea tea tea", "tea and tea", 2 * 2 / (3 + 3)),  # a word counts as often as both have it
        ("don't", "don t", 1.0),  # punctuation becomes a space
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_f1_by_hand(reply, reference, score):
    assert f1(reply, reference) == pytest.approx(score)


def test_candidates_in_one_pass_score_as_each_by_itself(model):
    torch.manual_seed(0)
    context = torch.randint(50257, (40,)).tolist()
    continuations = [torch.randint(50257, (n,)).tolist() for n in (1, 5, 12, 1, 3, 15)]
    together = loglikelihoods(model, context, continuations)
    for ids, score in zip(continuations, together, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([context + ids]))[0][0].log_softmax(-1)
        alone = sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(ids))
        assert score == pytest.approx(alone, abs=1e-4 * len(ids))


def test_all_candidates_may_exceed_the_context_but_no_single_one(model):
    context = list(range(100))
    assert len(loglikelihoods(model, context, [[5] * 29] * 20)) == 20
    with pytest.raises(ValueError, match="129 tokens"):
        loglikelihoods(model, context, [[5] * 30])


def brute_force(model, messages, reply):
    """Return (log-likelihood, tokens) of a reply by a forward pass over the whole conversation."""
    prompt = TOKENIZER.render(messages, add_generation_prompt=True)[0]
    ids = TOKENIZER.render([*messages, {"role": "assistant", "content": reply}])[0]
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    scores = [logprobs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
    return sum(scores), len(scores)


def test_hits_and_perplexity_are_those_of_brute_force(model, valid):
    lines = convai2.examples(valid)
    metrics = convai2.rank(model, TOKENIZER, lines)
    hits = n = nll = nll_plain = 0
    for persona, messages, reply, candidates in lines:
        system = [{"role": "system", "content": persona}]
        scores = [brute_force(model, system + messages, candidate) for candidate in candidates]
        hits += max(range(3), key=lambda i: scores[i][0] / scores[i][1]) == 2
        nll -= scores[-1][0]
        plain, length = brute_force(model, messages, reply)
        nll_plain -= plain
        n += length
    assert metrics["hits_1"] == hits / 3
    assert metrics["persona_perplexity"] == pytest.approx(math.exp(nll / n), rel=1e-4)
    assert metrics["plain_perplexity"] == pytest.approx(math.exp(nll_plain / n), rel=1e-4)


@pytest.mark.parametrize(("favourite", "hits"), [("hello , how are you ?", 1 / 3), ("no .", 0)])
def test_hits_at_1_by_hand(valid, favourite, hits):
    # a model that is sure of one reply: it is right in the first of three lines, or in none
    ids = [*TOKENIZER.encode(" " + favourite), TOKENIZER.eos_id]
    after = dict(zip([*TOKENIZER.encode("]:"), *ids[:-1]], ids, strict=True))

    class Certain(torch.nn.Module):
        config = GPTConfig(block_size=128)
        transformer = torch.nn.ModuleDict({"wpe": torch.nn.Embedding(1, 1)})
        lm_head = torch.nn.Identity()

        def hidden(self, idx, positions, attend):
            logits = torch.zeros(1, idx.size(1), TOKENIZER.n_vocab)
            for i, token in enumerate(idx[0].tolist()):
                if token in after:
                    logits[0, i, after[token]] = 20.0
            return logits

    assert convai2.rank(Certain(), TOKENIZER, convai2.examples(valid))["hits_1"] == hits


def test_a_file_without_candidates_has_no_hits(model, valid):
    valid.write_text("\n".join(line.split("\t\t")[0] for line in DIALOGS.splitlines()))
    assert convai2.rank(model, TOKENIZER, convai2.examples(valid))["hits_1"] is None


@pytest.fixture
def call(in_process, tmp_path, monkeypatch, model):
    """Run one of the two scripts with a small model: call(convai2, source=valid)."""
    monkeypatch.chdir(tmp_path)
    save_model(model, TOKENIZER, "model")

    def call(script, **knobs):
        knobs = {"init_from": "model"} | knobs
        arguments = [f"--{name}={value}" for name, value in knobs.items()]
        return in_process(lambda: run(script.main, script.Config), "script.py", *arguments)

    return call


def test_it_stands_next_to_the_published_numbers(call, valid):
    done = call(convai2, source=valid, max_new_tokens=16, json="metrics.json")
    assert done.returncode == 0, done.stderr
    rows = {line[:46].strip(): line[46:].split() for line in done.stdout.splitlines()}
    assert rows[""] == ["model", "TransferTransfo", "conv-ai"]
    assert rows["Hits@1 of 20 candidates"][1:] == ["80.7%", "79.0%"]
    assert rows["perplexity with the persona"][1:] == ["16.28", "20.50"]
    assert rows["F1"][1:] == ["19.5%", "16.5%"]
    metrics = json.loads(Path("metrics.json").read_text())["model"]
    assert rows["F1"][0] == f"{metrics['f1']:.1%}"


def test_a_wrong_file_is_one_clear_line(call, valid, tmp_path):
    assert_refused(call(convai2, source="nothing"), "nothing")
    valid.write_text(DIALOGS.replace("|good morning .", ""))
    assert_refused(call(convai2, source=valid), "dialog 2", "good morning .")
    archive = tmp_path / "cut.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(valid)
        file.add(Path(__file__))
    archive.write_bytes(archive.read_bytes()[:-300])
    assert_refused(call(convai2, source=archive), archive)
    valid.write_text("1 hello\n")
    assert_refused(call(convai2, source=valid), "line 1")


# --- the first batches ----------------------------------------------------------------------------


def test_the_first_batches_are_those_of_a_training_loop(call, data_dir, tmp_path):
    knobs = {"dataset": "talk", "batch_size": 2, "learning_rate": 1e-2, "batches": 4}
    torch.manual_seed(0)
    config = GPTConfig(block_size=256, n_layer=1, n_head=2, n_embd=32)
    save_model(GPT(config), TOKENIZER, "longer")
    done = call(first_batches, base="longer", json="both.json", **knobs)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(Path("both.json").read_text())["model"]

    # the shorter context holds for both
    model, tokenizer = load_model("model")
    loader = Loader(find_shards(data_dir, "talk", "train"), 2, 128, 1337, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for number, batch in enumerate(metrics):
        x, y, documents = loader.batch(number)
        loss = model(x, y, documents=documents)[1]
        assert batch["loss"] == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(metrics) == 4 and metrics[-1]["loss"] < metrics[0]["loss"]
    names, keys, first = done.stdout.splitlines()[:3]
    assert names.split() == ["longer", "model"]
    assert keys.split() == ["batch", *["loss", "reward", "penalty", "bleu"] * 2]
    assert first.split()[0] == "1" and first.split()[5] == f"{metrics[0]['loss']:.4f}"


def test_replies_of_a_batch_are_without_their_ends(tmp_path, model):
    conversations = small_talk(4, seed=1)
    write_shards(tmp_path, conversations, conversations)
    batch = Loader([(tmp_path / "val.bin", 1.0)], 1, 128, 0, TOKENIZER).batch(0)
    pairs = predict(model, *batch, "cpu").replies()
    replies = set()
    for messages in conversations:
        replies |= {m["content"] for m in messages if m["role"] == "assistant"}
    assert all(len(predicted) == len(target) for predicted, target in pairs)
    assert {TOKENIZER.decode(target).strip() for _, target in pairs} <= replies


@pytest.mark.parametrize(("word", "bleu"), [(None, 1.0), (" zebra", 0.0)])
def test_bleu_of_a_batch_by_hand(call, data_dir, monkeypatch, word, bleu):
    """It is 1 for a model that is always right, 0 for one that always says zebra, ends aside."""

    def always(*batch):
        prediction = predict(*batch)
        prediction.predicted = prediction.targets.clone()
        if word:
            ends = prediction.targets == TOKENIZER.eos_id
            prediction.predicted[~ends] = TOKENIZER.encode(word)[0]
        return prediction

    monkeypatch.setattr(first_batches, "predict", always)
    assert call(first_batches, dataset="talk", batches=1, json="f.json").returncode == 0
    (batch,) = json.loads(Path("f.json").read_text())["model"]
    assert batch["bleu"] == pytest.approx(bleu, abs=0.02)


def test_a_loss_that_blows_up_is_null_in_json(call, data_dir):
    knobs = {"dataset": "talk", "batch_size": 1, "learning_rate": 1e4, "batches": 3}
    done = call(first_batches, json="f.json", **knobs)
    assert done.returncode == 0, done.stderr
    text = Path("f.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert_refused(call(first_batches, dataset="nowhere"), "nowhere/train*.bin")
