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


def test_hugging_faces_json_gives_the_same_lines(valid, tmp_path):
    turns = [
        {
            "history": ["hi there"],
            "candidates": ["i am a cook .", "no .", "hello , how are you ?"],
        },
        {
            "history": ["hi there", "hello , how are you ?", "fine . and you ?"],
            "candidates": ["yes .", "hello , how are you ?", "i drink tea ."],
        },
        {
            "history": ["__ SILENCE __"],
            "candidates": ["no .", "hello , how are you ?", "good morning ."],
        },
    ]
    conversations = [
        {"personality": ["i like tea.", "i have a dog."], "utterances": turns[:2]},
        {"personality": ["i am old."], "utterances": turns[2:]},
    ]
    path = tmp_path / "personachat_self_original.json"
    other = {"personality": ["i train."], "utterances": turns[:1]}
    path.write_text(json.dumps({"train": [other], "valid": conversations}))
    assert convai2.examples(path) == convai2.examples(valid)


def test_the_downloaded_edition_is_measured(call, valid):
    folder = Path("data/downloads")
    folder.mkdir(parents=True)
    turn = {"history": ["hi"], "candidates": ["no .", "hello ."]}
    lists = {"train": [], "valid": [{"personality": ["i ski ."], "utterances": [turn]}]}
    (folder / "personachat_self_original.json").write_text(json.dumps(lists))
    assert "Hits@1" in call(convai2, max_new_tokens=4).stdout


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


def lines_of(path):
    """Return the arguments of convai2.rank."""
    lines = []
    for persona, messages, reply, candidates in convai2.examples(path):
        lines.append(([{"role": "system", "content": persona}, *messages], reply, candidates))
    return lines


def test_hits_and_perplexity_are_those_of_brute_force(model, valid):
    hits = n = nll = 0
    for messages, _, candidates in lines_of(valid):
        scores = [brute_force(model, messages, candidate) for candidate in candidates]
        hits += max(range(3), key=lambda i: scores[i][0] / scores[i][1]) == 2
        nll -= scores[-1][0]
        n += scores[-1][1]
    metrics = convai2.rank(model, TOKENIZER, lines_of(valid))
    assert metrics["hits_1"] == hits / 3
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / n), rel=1e-4)


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

    assert convai2.rank(Certain(), TOKENIZER, lines_of(valid))["hits_1"] == hits


def test_a_file_without_candidates_has_no_hits(model, valid):
    valid.write_text("\n".join(line.split("\t\t")[0] for line in DIALOGS.splitlines()))
    assert convai2.rank(model, TOKENIZER, lines_of(valid))["hits_1"] is None


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
    done = call(convai2, source=valid, max_new_tokens=16)
    assert done.returncode == 0, done.stderr
    rows = {line[:46].strip(): line[46:].split() for line in done.stdout.splitlines()}
    assert rows[""] == ["model", "TransferTransfo", "conv-ai"]
    assert rows["Hits@1 of 20 candidates"][1:] == ["80.7%", "79.0%"]
    assert rows["perplexity per token (published: per word)"][1:] == ["16.28", "20.50"]
    assert rows["F1"][1:] == ["19.5%", "16.5%"]


def test_a_wrong_file_is_one_clear_line(call, valid, tmp_path):
    assert_refused(call(convai2, source="nothing"), "nothing")
    assert_refused(call(convai2), "data/downloads/personachat.tgz", "--source")
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


def batches_of(done):
    """Return the rows of the table that first_batches prints, as numbers."""
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["batch", "loss", "reward", "penalty", "bleu"]
    return [[float(cell.rstrip("%")) for cell in line.split()] for line in lines]


def test_the_first_batches_are_those_of_a_training_loop(call, data_dir, tmp_path):
    knobs = {"dataset": "talk", "batch_size": 2, "learning_rate": 1e-2, "batches": 4}
    batches = batches_of(call(first_batches, **knobs))
    model, tokenizer = load_model("model")
    loader = Loader(find_shards(data_dir, "talk", "train"), 2, 128, 1337, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for number, (batch, loss, *_) in enumerate(batches):
        x, y, documents = loader.batch(number)
        expected = model(x, y, documents=documents)[1]
        assert (batch, loss) == (number + 1, pytest.approx(expected.item(), rel=1e-4))
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(batches) == 4 and batches[-1][1] < batches[0][1]


def test_replies_of_a_batch_are_without_their_ends(tmp_path, model):
    conversations = small_talk(4, seed=1)
    write_shards(tmp_path, conversations, conversations)
    batch = Loader([(tmp_path / "val.bin", 1.0)], 1, 128, 0, TOKENIZER).batch(0)
    targets, _, _, starts = predict(model, *batch, "cpu")
    texts = first_batches.texts_of_replies(targets, starts, TOKENIZER)
    replies = set()
    for messages in conversations:
        replies |= {m["content"] for m in messages if m["role"] == "assistant"}
    assert texts and {text.strip() for text in texts} <= replies


@pytest.mark.parametrize(("word", "bleu"), [(None, 1.0), (" zebra", 0.0)])
def test_bleu_of_a_batch_by_hand(call, data_dir, monkeypatch, word, bleu):
    """It is 1 for a model that is always right, 0 for one that always says zebra, ends aside."""

    def always(*batch):
        targets, _, nll, starts = predict(*batch)
        predicted = targets.clone()
        if word:
            predicted[targets != TOKENIZER.eos_id] = TOKENIZER.encode(word)[0]
        return targets, predicted, nll, starts

    monkeypatch.setattr(first_batches, "predict", always)
    [batch] = batches_of(call(first_batches, dataset="talk", batches=1))
    assert batch[4] == pytest.approx(100 * bleu, abs=2)


def test_a_loss_that_blows_up_is_shown(call, data_dir):
    knobs = {"dataset": "talk", "batch_size": 1, "learning_rate": 1e4, "batches": 3}
    assert len(batches_of(call(first_batches, **knobs))) == 3
    assert_refused(call(first_batches, dataset="nowhere"), "nowhere/train*.bin")
