"""ConvAI2's convai2_metrics: F1 and Hits@1 against hand-made files, candidates one by one, and counts by hand."""

import math
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, small_talk, write_shards

import evaluate
from evaluation.convai2 import convai2_metrics, loglikelihoods
from evaluation.metrics import f1
from model import GPT, GPTConfig
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.configurator import run
from nanochatgpt.tokenizer import Tokenizer
from prepare import personachat

TOKENIZER = Tokenizer()
PUBLISHED_FORM = """\
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
    path.write_text(PUBLISHED_FORM)
    return path


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        p.data *= 4  # so that scores differ
    return model


def brute_force(model, messages, reply):
    """Return (log-likelihood, tokens) of a reply by a forward pass over the whole conversation."""
    prompt = TOKENIZER.render(messages, add_generation_prompt=True)[0]
    ids = TOKENIZER.render([*messages, {"role": "assistant", "content": reply}])[0]
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    at = range(len(prompt), len(ids))
    return sum(logprobs[i - 1, ids[i]].item() for i in at), len(at)


def test_a_line_is_the_persona_what_was_said_the_reply_and_its_candidates(valid):
    first, second, third = personachat.examples(valid)
    assert first == (
        "i like tea. i have a dog.",
        [{"role": "user", "content": "hi there"}],
        "hello , how are you ?",
        ["i am a cook .", "no .", "hello , how are you ?"],
    )
    assert [message["content"] for message in second[1]] == [
        "hi there",
        "hello , how are you ?",
        "fine . and you ?",
    ]
    assert third[:3] == ("i am old.", [], "good morning .")  # __SILENCE__ is nothing said
    assert len(personachat.examples(valid, max_dialogs=1)) == 2


@pytest.mark.parametrize(
    ("reply", "gold", "score"),
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
def test_f1_by_hand(reply, gold, score):
    assert f1(reply, gold) == pytest.approx(score)


def test_candidates_in_one_row_score_as_each_by_itself(model):
    torch.manual_seed(0)
    context = torch.randint(50257, (40,)).tolist()
    continuations = [torch.randint(50257, (n,)).tolist() for n in (1, 5, 12, 1, 3, *range(1, 16))]
    together = loglikelihoods(model, context, continuations)
    for ids, score in zip(continuations, together, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([context + ids]))[0][0].log_softmax(-1)
        alone = sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(ids))
        assert score == pytest.approx(alone, abs=1e-4 * len(ids))


def test_together_they_may_be_longer_than_the_context_but_not_one_alone(model):
    context = list(range(100))
    assert len(loglikelihoods(model, context, [[5] * 29] * 20)) == 20
    with pytest.raises(ValueError, match="129 tokens"):
        loglikelihoods(model, context, [[5] * 30])


def test_the_marks_are_those_of_brute_force(model, valid):
    lines = personachat.examples(valid)
    figures = convai2_metrics(model, TOKENIZER, lines, 128, lambda n: None)
    hits = n = 0
    nll = {"persona_perplexity": 0.0, "plain_perplexity": 0.0}
    for persona, said, reply, candidates in lines:
        system = [{"role": "system", "content": persona}]
        scores = [brute_force(model, system + said, candidate) for candidate in candidates]
        hits += max(range(3), key=lambda i: scores[i][0] / scores[i][1]) == 2
        nll["persona_perplexity"] -= scores[-1][0]
        alone, length = brute_force(model, said, reply)
        nll["plain_perplexity"] -= alone
        n += length
    assert figures["hits_1"] == hits / 3
    for name, total in nll.items():
        assert figures[name] == pytest.approx(math.exp(total / n), rel=1e-4)


@pytest.mark.parametrize("favourite", ["hello , how are you ?", "no ."])
def test_hits_at_1_by_hand(valid, favourite):
    # A model that thinks one reply certain: the first of three lines is hit, or none (no . is nowhere the reply).
    class Certain(torch.nn.Module):
        config = GPTConfig(block_size=128)
        transformer = torch.nn.ModuleDict({"wpe": torch.nn.Embedding(1, 1)})
        lm_head = torch.nn.Identity()

        def hidden(self, idx, branches, positions):
            wanted = [*TOKENIZER.encode(" " + favourite), TOKENIZER.eos_id]
            after = dict(zip([*TOKENIZER.encode("]:"), *wanted[:-1]], wanted, strict=True))
            logits = torch.zeros(1, idx.size(1), TOKENIZER.n_vocab)
            for i, token in enumerate(idx[0].tolist()):
                if token in after:
                    logits[0, i, after[token]] = 20.0
            return logits

    figures = convai2_metrics(
        Certain(), TOKENIZER, personachat.examples(valid), 128, lambda n: None
    )
    assert figures["hits_1"] == (1 / 3 if favourite != "no ." else 0)


def test_a_file_without_candidates_has_no_hits(model, valid):
    valid.write_text("\n".join(line.split("\t\t")[0] for line in PUBLISHED_FORM.splitlines()))
    assert (
        convai2_metrics(model, TOKENIZER, personachat.examples(valid), 128, lambda n: None)[
            "hits_1"
        ]
        is None
    )


@pytest.fixture
def call(in_process, tmp_path, model):
    save_model(model, TOKENIZER, tmp_path / "model")

    def call(**knobs):
        knobs = {
            "init_from": tmp_path / "model",
            "probes": 0,
            "max_new_tokens": 16,
            "dataset": "",
        } | knobs
        arguments = [f"--{name}={value}" for name, value in knobs.items()]
        return in_process(lambda: run(evaluate.main, evaluate.Config), "evaluate.py", *arguments)

    return call


def test_evaluate_shows_them_beside_the_published_ones(call, valid):
    done = call(convai2=valid)
    assert done.returncode == 0, done.stderr
    rows = {line[:46].strip(): line[46:].split() for line in done.stdout.splitlines()}
    assert rows[""] == [str(valid.parent / "model"), "people", "TransferTransfo", "conv-ai"]
    assert rows["ConvAI2: Hits@1 of 20 candidates"][1:] == ["80.7%", "79.0%"]
    assert rows["ConvAI2: perplexity with the persona"][1:] == ["16.28", "20.50"]
    assert rows["ConvAI2: F1"][1:] == ["19.5%", "16.5%"] and rows["ConvAI2: F1"][0].endswith("%")
    assert_refused(call(convai2=valid, replies=5), "replies does nothing with convai2")


def test_a_wrong_file_is_one_clear_line(call, valid, tmp_path):
    assert_refused(call(convai2=tmp_path / "nothing"), "nothing does not exist")
    valid.write_text(PUBLISHED_FORM.replace("|good morning .", ""))
    assert_refused(call(convai2=valid), "dialog 2", "good morning .")
    packed = tmp_path / "cut.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(valid)
        archive.add(Path(__file__))
    packed.write_bytes(packed.read_bytes()[:-300])
    assert_refused(call(convai2=packed), packed)
    valid.write_text("1 hello\n")
    assert_refused(call(convai2=valid), "line 1")


# its first batches: gpt2-conversational-or-qa's table


def test_the_first_batches_are_those_of_a_training_loop(call, tmp_path, data_dir):
    """Of a base with a longer context too, so that both see the same rows."""
    torch.manual_seed(0)
    save_model(
        GPT(GPTConfig(block_size=256, n_layer=1, n_head=2, n_embd=32)),
        TOKENIZER,
        tmp_path / "longer",
    )
    options = {"data_dir": data_dir, "dataset": "talk", "batch_size": 2, "learning_rate": 1e-2}
    done = call(first_batches=4, json=tmp_path / "figures.json", **options)
    assert (
        call(
            first_batches=4, json=tmp_path / "both.json", base=tmp_path / "longer", **options
        ).returncode
        == 0
    )
    both = evaluate.json.loads((tmp_path / "both.json").read_text())
    assert (
        both[str(tmp_path / "model")]
        == evaluate.json.loads((tmp_path / "figures.json").read_text())[str(tmp_path / "model")]
    )
    assert done.returncode == 0, done.stderr
    figures = evaluate.json.loads((tmp_path / "figures.json").read_text())[str(tmp_path / "model")]
    model, tokenizer = load_model(str(tmp_path / "model"))
    loader = evaluate.Loader(
        evaluate.find_shards(data_dir, "talk", "train"), 2, 128, 1337, tokenizer
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for number, batch in enumerate(figures):
        x, y, documents = loader.batch(number)
        loss = model(x, y, documents=documents)[1]
        assert batch["loss"] == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(figures) == 4 and figures[-1]["loss"] < figures[0]["loss"]
    header, keys, first = done.stdout.splitlines()[:3]
    assert header.strip() == str(tmp_path / "model") and keys.split() == [
        "batch",
        "loss",
        "reward",
        "penalty",
        "bleu",
    ]
    assert first.split()[:2] == ["1", f"{figures[0]['loss']:.4f}"]


def test_replies_of_a_batch_are_without_their_ends(tmp_path):
    write_shards(tmp_path, small_talk(4, seed=1), small_talk(4, seed=1))
    loader = evaluate.Loader([(tmp_path / "val.bin", 1.0)], 1, 128, 0, TOKENIZER)
    model = GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=32))
    x, y, documents = loader.batch(0)
    pairs = evaluate.predict(model, x, y, documents, "cpu").replies()
    said = [
        m["content"] for talk in small_talk(4, seed=1) for m in talk if m["role"] == "assistant"
    ]
    assert all(len(a) == len(b) for a, b in pairs)
    assert {TOKENIZER.decode(target).strip() for _, target in pairs} <= set(said)


@pytest.mark.parametrize(("predicted", "bleu"), [("{}", 1.0), ("zebra", 0.0)])
def test_bleu_of_a_batch_by_hand(call, tmp_path, data_dir, monkeypatch, predicted, bleu):
    """Of a model that is always right it is 1, and 0 of one that shares no word: the ends of replies do not count."""
    real = evaluate.predict

    def predict(*batch):
        prediction = real(*batch)
        right = prediction.targets.clone()
        if predicted == "zebra":
            right[right != TOKENIZER.eos_id] = TOKENIZER.encode(" zebra")[0]
        prediction.likeliest = right
        return prediction

    monkeypatch.setattr(evaluate, "predict", predict)
    options = {
        "data_dir": data_dir,
        "dataset": "talk",
        "first_batches": 1,
        "json": tmp_path / "f.json",
    }
    assert call(**options).returncode == 0
    (batch,) = evaluate.json.loads((tmp_path / "f.json").read_text())[str(tmp_path / "model")]
    assert batch["bleu"] == pytest.approx(bleu, abs=0.02)


def test_a_rate_that_blows_up_is_shown_as_such(call, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"data_dir": data_dir, "dataset": "talk", "batch_size": 1, "learning_rate": 1e4}
    done = call(first_batches=3, json="f.json", **options)
    assert done.returncode == 0, done.stderr

    def no_number(name):
        raise AssertionError(f"{name} is not JSON")

    evaluate.json.loads(Path("f.json").read_text(), parse_constant=no_number)


def test_first_batches_need_a_dataset(call):
    assert_refused(call(first_batches=2), "first_batches needs a dataset")
    assert_refused(call(first_batches=2, dataset="talk", report="r.html"), "report")
