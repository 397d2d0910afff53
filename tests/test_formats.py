"""Conversations in every format are read as a straightforward reader reads them, and nothing is
learned that should not be."""

import codecs
import gzip
import importlib
import io
import json
import sys
from pathlib import Path

import pytest
from conftest import assert_refused
from hypothesis import given
from hypothesis import strategies as st

from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from prepare import eli5, parlai, retry
from prepare import text as plain_text
from prepare.formats import conversation, n_learned
from prepare.preferences import examples

TOKENIZER = Tokenizer()
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
texts = st.text(max_size=12)


def talk(n):
    return [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "hello"}]


def message(role, content, **more):
    return {"role": role, "content": content} | more


# a conversation: (system, [(user, assistant, learned)])
conversations = st.tuples(
    texts, st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4)
)


def reference(system, exchanges):
    """Return the messages of a conversation, by its description."""
    messages = [message("system", system.strip())] if system.strip() else []
    for user, assistant, learned in exchanges:
        if user.strip():
            messages.append(message("user", user.strip()))
        if assistant.strip():
            weight = {} if learned else {"weight": 0}
            messages.append(message("assistant", assistant.strip(), **weight))
    return messages


def as_openai(system, exchanges):
    messages = [message("developer", [{"type": "text", "text": system}])]
    for user, assistant, learned in exchanges:
        messages.append(message("user", user, name="nora"))
        messages.append(message("assistant", assistant, weight=int(learned), tool_calls=[]))
    return {"messages": messages, "tools": []}


def as_axolotl(system, exchanges):
    messages = []
    for user, assistant, learned in exchanges:
        messages.append(message("user", user, train=True))
        messages.append(message("assistant", assistant, training=learned))
    return {"messages": messages, "system": system}


def as_sharegpt(system, exchanges):
    turns = [{"from": "system", "value": system}]
    for user, assistant, learned in exchanges:
        turns.append({"from": "human", "value": user})
        turns.append({"from": "gpt", "value": assistant, "weight": float(learned)})
    return {"id": "7", "conversations": turns}


@pytest.mark.parametrize("write", [as_openai, as_axolotl, as_sharegpt])
@given(talk=conversations)
def test_each_format_of_turns_is_read_as_the_reference_reads_it(write, talk):
    _, messages, n_blank = conversation(write(*talk))
    assert messages == reference(*talk)
    assert n_blank == sum(not assistant.strip() for _, assistant, _ in talk[1])
    assert n_learned(messages) == sum(bool(a.strip() and learned) for _, a, learned in talk[1])


@given(talk=conversations, given_input=texts)
def test_alpaca_is_its_history_then_the_instruction_with_its_input(talk, given_input):
    system, exchanges = talk
    *history, (instruction, output, _) = [
        (user, assistant, True) for user, assistant, _ in exchanges
    ]
    record = {"system": system, "history": [[user, assistant] for user, assistant, _ in history]}
    record |= {"instruction": instruction, "input": given_input, "output": output}
    question = "\n".join(text.strip() for text in (instruction, given_input) if text.strip())
    assert conversation(record)[1] == reference(system, [*history, (question, output, True)])


@pytest.mark.parametrize("as_texts", [True, False])
@given(prompt=texts, completion=texts, system=texts)
def test_prompt_and_completion_are_texts_or_messages(as_texts, prompt, completion, system):
    record = {"prompt": prompt, "completion": completion, "system": system}
    if not as_texts:
        record["prompt"] = [message("user", prompt)]
        record["completion"] = [message("assistant", completion)]
    assert conversation(record)[1] == reference(system, [(prompt, completion, True)])


@given(talk=conversations)
def test_texts_alternate_and_dollys_context_is_the_input(talk):
    system, exchanges = talk
    spoken = [(user, assistant, True) for user, assistant, _ in exchanges]
    turns = [text for user, assistant, _ in exchanges for text in (user, assistant)]
    for name in ("dialog", "data"):
        assert conversation({name: turns, "system": system})[1] == reference(system, spoken)
    user, assistant, _ = exchanges[0]
    dolly = {"instruction": "sum up", "context": user, "response": assistant, "category": "qa"}
    question = f"sum up\n{user.strip()}".strip()
    assert conversation(dolly)[1] == reference("", [(question, assistant, True)])


def test_what_the_system_says_comes_first_and_once():
    record = {"system": "be kind", "messages": [*TALK, message("system", "be brief")]}
    record["messages"].append(message("developer", "be kind"))
    assert conversation(record)[1] == [message("system", "be kind\nbe brief"), *TALK]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [message("user", "hi"), message("tool", "42")]}, ["message 2", "tool"]),
        (
            {"messages": [message("assistant", None, tool_calls=[{"id": "1"}])]},
            ["message 1", "tool"],
        ),
        ({"conversations": [{"from": "observation", "value": "x"}]}, ["message 1", "tool"]),
        ({"messages": [message("user", [{"type": "image_url"}])]}, ["message 1", "image_url"]),
        ({"messages": [message("narrator", "x")]}, ["message 1", "narrator"]),
        ({"messages": [message("assistant", "x", weight=0.5)]}, ["message 1", "0.5"]),
        ({"messages": [message("user", 7)]}, ["message 1", "7"]),
        ({"messages": [message("Tool", "42")]}, ["message 1", "tool"]),
        ({"messages": [message("user", "x", images=["a.jpg"])]}, ["message 1", "images"]),
        ({"messages": TALK, "image": "a.jpg"}, ["image"]),
        ({"messages": [message("assistant", "x", train="false")]}, ["message 1", "'false'"]),
        ({"data": "example"}, ["data"]),
        ({"dialog": None}, ["dialog"]),
        ({"instruction": "x", "answer": "y"}, ["output"]),
        ({"instruction": "x", "output": "y", "history": ["ab", "cd"]}, ["history", "ab"]),
        ({"messages": [["hi"]]}, ["message 1", "hi"]),
        ({"text": "hi"}, ["text"]),
        ({}, ["no conversation"]),
    ],
)
def test_what_cannot_be_learned_is_named(record, words):
    with pytest.raises(ValueError) as refused:
        conversation(record)
    for word in words:
        assert word in str(refused.value)


# ---- files


@pytest.fixture
def prepared(as_main, tmp_path, monkeypatch):
    """Run prepare/jsonl.py on these bytes: prepared(b"...", "talk.jsonl") -> (process, the text of
    both shards with what is learned in «»)."""
    monkeypatch.chdir(tmp_path)

    def run(content, name="talk.jsonl"):
        (tmp_path / name).write_bytes(content)
        done = as_main("prepare/jsonl.py", f"--source={name}", "--out_dir=out")
        text = ""
        if done.returncode == 0:
            for split in ("train", "val"):
                shard = open_shard(tmp_path / "out" / f"{split}.bin")
                mask = shard.mask(0, len(shard.tokens))
                for token, learned in zip(shard.tokens.tolist(), mask, strict=True):
                    piece = TOKENIZER.decode([token])
                    text += f"«{piece}»" if learned else piece
        return done, text.replace("»«", "")

    return run


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_a_reply_of_weight_0_is_in_the_shard_and_not_learned(prepared):
    context = [message("user", "a"), message("assistant", "bad", weight=0)]
    records = []
    for n in range(3):
        records.append(
            {"messages": [*context, message("user", n * "b"), message("assistant", "good")]}
        )
    done, text = prepared(lines(*records))
    assert done.returncode == 0, done.stderr
    assert "[Bot]: bad<|endoftext|>" in text and "[Bot]:« good<|endoftext|>»" in text


def test_blank_replies_are_left_out_and_counted(prepared):
    blank = {"messages": [message("user", "b"), message("assistant", " \n")]}
    some = {"messages": [*blank["messages"], *TALK]}
    done, text = prepared(
        lines({"messages": TALK}, blank, some, {"prompt": "hi", "completion": "ho"})
    )
    assert done.returncode == 0, done.stderr
    assert "«<|endoftext|>»" not in text and text.count("« hello<|endoftext|>»") == 2
    assert "1 of 4 records left out" in done.stdout
    assert "2 blank replies" in done.stdout and "OpenAI's messages (3)" in done.stdout


RECORDS = [{"messages": talk(n)} for n in range(3)]
JSONL = lines(*RECORDS)
PRETTY = json.dumps(RECORDS, indent=2).encode()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (JSONL, "talk.jsonl"),
        (PRETTY, "talk.json"),
        (codecs.BOM_UTF8 + JSONL, "talk.jsonl"),
        (codecs.BOM_UTF8 + PRETTY, "talk.json"),
        (b"\n" + JSONL.replace(b"\n", b"\r\n\r\n"), "talk.jsonl"),
        (gzip.compress(JSONL, mtime=0), "talk.JSONL.GZ"),
        (JSONL.replace(b"\n", b"\r"), "talk.jsonl"),
        (JSONL.replace(b'"}], ', b'"}],\n').replace(b"}, {", b"},\n{"), "talk.jsonl"),
        (gzip.compress(PRETTY, mtime=0), "talk"),
        ("\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(), "talk.jsonl"),
    ],
)
def test_lines_and_lists_are_read_whatever_their_name(prepared, content, name):
    done, text = prepared(content, name)
    assert done.returncode == 0, done.stderr
    assert text.count("« hello<|endoftext|>»") == 3


def parquet(records):
    """Return the bytes of a Parquet file, in row groups of two."""
    table = pytest.importorskip("pyarrow").Table.from_pylist(records)
    buffer = io.BytesIO()
    importlib.import_module("pyarrow.parquet").write_table(table, buffer, row_group_size=2)
    return buffer.getvalue()


def test_parquet_is_read_as_json_lines_are(prepared):
    for records in (RECORDS, [as_sharegpt(f"be {n}", [("hi", "hello", True)]) for n in range(5)]):
        done, text = prepared(parquet(records), "talk.parquet")
        assert done.returncode == 0, done.stderr
        assert text == prepared(lines(*records))[1]
        assert text.count("« hello<|endoftext|>»") == len(records)


def test_other_scripts_read_parquet_too(as_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [as_trl(f"hi {n}", "good", "bad") for n in range(60)]
    columns = [{"System": "", "User": f"hi {n}", "Assistant": "hello"} for n in range(60)]
    for script, records in (("retry", pairs), ("columned_chat", columns)):
        Path("table").write_bytes(parquet(records))
        Path("lists").write_bytes(lines(*records))
        if script == "columned_chat":
            Path("lists").write_text(json.dumps({"train": records}))
        for source in ("table", "lists"):
            knobs = [f"--source={source}", f"--out_dir={script}/{source}"]
            done = as_main(f"prepare/{script}.py", *knobs)
            assert done.returncode == 0, done.stderr
        for split in ("train.bin", "val.bin"):
            bodies = [Path(script, source, split).read_bytes() for source in ("table", "lists")]
            assert bodies[0] == bodies[1]


def test_a_damaged_parquet_file_and_a_missing_pyarrow_are_named(prepared, monkeypatch):
    whole = parquet(RECORDS)
    for body in (whole[:-10], whole[:4] + bytes(40) + whole[44:]):
        assert_refused(prepared(body)[0], "talk.jsonl")
    bad = prepared(parquet([RECORDS[0], {"messages": None}, RECORDS[1]]))[0]
    assert_refused(bad, "talk.jsonl", "record 2")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(prepared(whole)[0], "talk.jsonl", "pip install -e '.[hub]'")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (JSONL.decode().encode("utf-16"), "UTF-16"),
        (b"ARROW1" + bytes(100), "prepare/hub.py"),
        (b"\xff\xff\xff\xff" + bytes(100), "prepare/hub.py"),
        (gzip.compress(b"PAR1" + bytes(100), mtime=0), "Parquet"),
        (b"PAR1" + bytes(100), "Parquet"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
        (JSONL + b'{"messages": "\xe9"}\n', "line 4"),
        (JSONL + b"\n\n{broken\n", "line 6"),
    ],
)
def test_other_files_are_refused_by_what_they_are(prepared, content, word):
    assert_refused(prepared(content)[0], "talk.jsonl", word)


# ---- preference pairs


def as_trl(user, chosen, rejected):
    return {"prompt": user, "chosen": chosen, "rejected": rejected}


def as_trl_messages(user, chosen, rejected):
    replies = [[message("assistant", reply)] for reply in (chosen, rejected)]
    return {"prompt": [message("user", user)], "chosen": replies[0], "rejected": replies[1]}


def as_implicit(user, chosen, rejected):
    talks = [[message("user", user), message("assistant", reply)] for reply in (chosen, rejected)]
    return {"chosen": talks[0], "rejected": talks[1], "score_chosen": 7.5}


def as_anthropics(user, chosen, rejected):
    talks = [f"\n\nHuman: {user}\n\nAssistant: {reply}" for reply in (chosen, rejected)]
    return {"chosen": talks[0], "rejected": talks[1]}


def as_openais(user, chosen, rejected):
    record = {"input": {"messages": [message("user", user)], "tools": []}}
    record["preferred_output"] = [message("assistant", chosen)]
    return record | {"non_preferred_output": [message("assistant", rejected)]}


FORMS_OF_PAIRS = [as_trl, as_trl_messages, as_implicit, as_anthropics, as_openais]


@pytest.mark.parametrize("write", FORMS_OF_PAIRS)
@given(user=texts, chosen=texts, rejected=texts)
def test_a_pair_is_two_conversations_unless_its_replies_are_equal_or_blank(
    write, user, chosen, rejected
):
    expected = []
    if chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip():
        expected = [
            (reference("", [(user, chosen, True)]), 1),
            (reference("", [(user, rejected, True)]), 0),
        ]
    assert examples(write(user, chosen, rejected))[1] == expected


def test_texts_without_a_prompt_have_what_both_begin_with_as_their_prompt():
    record = {"chosen": "The sky is blue today.", "rejected": "The sky is black."}
    prompt = message("user", "The sky is")
    assert examples(record)[1] == [
        ([prompt, message("assistant", "blue today.")], 1),
        ([prompt, message("assistant", "black.")], 0),
    ]


WHOLE = [[message("user", "1+2?"), message("assistant", reply)] for reply in ("3", "4")]


@pytest.mark.parametrize(
    "record",
    [
        {"question": "1+2?", "chosen": "3", "rejected": "4"},
        {"instruction": "1+2?", "input": "", "chosen": "3", "rejected": "4"},
        {"input": "1+2?", "chosen": "3", "rejected": "4"},
        {"messages": WHOLE[0][:1], "chosen": "3", "rejected": "4"},
        {"prompt": "1+2?", "chosen": WHOLE[0], "rejected": WHOLE[1]},
        {"prompt": WHOLE[0][:1], "chosen": WHOLE[0], "rejected": WHOLE[1]},
    ],
)
def test_the_prompt_of_a_pair_has_many_names_and_comes_once(record):
    assert examples(record)[1] == [(WHOLE[0], 1), (WHOLE[1], 0)]


def test_the_system_next_to_a_pair_or_a_chat_is_its_persona():
    be = message("system", "be kind")
    record = {"system": "be kind", "question": "1+2?", "chosen": "3", "rejected": "4"}
    assert examples(record)[1] == [([be, *WHOLE[0]], 1), ([be, *WHOLE[1]], 0)]
    record = {"system": "be kind", "messages": [*TALK, *TALK]}
    record["retried"] = [{"before": 1, "content": "no"}]
    rejected = [be, TALK[0], message("assistant", "no")]
    assert examples(record)[1] == [([be, *TALK], 1), (rejected, 0)]


def test_a_system_prompt_is_the_persona_and_no_loss_is_no_weight():
    record = {"system_prompt": "be kind", "messages": [TALK[0], TALK[1] | {"loss": False}]}
    expected = [message("system", "be kind"), TALK[0], message("assistant", "hello", weight=0)]
    assert conversation(record)[1] == expected


def test_replies_within_a_prompt_are_not_learned():
    record = {"prompt": [*TALK, TALK[0]], "completion": "bye"}
    context = [TALK[0], TALK[1] | {"weight": 0}, TALK[0]]
    assert conversation(record)[1] == [*context, message("assistant", "bye")]


def test_a_rejected_reply_is_not_learned(prepared):
    done, _ = prepared(lines(*RECORDS, {"prompt": "hi", "completion": "no", "label": False}))
    assert_refused(done, "line 4", "label", "retry.py")


def test_anthropics_form_may_begin_at_once_and_with_the_system():
    for head, system in (("", []), ("System: be kind\n\n", [message("system", "be kind")])):
        texts = [f"{head}Human: hi\n\nAssistant: {reply}" for reply in ("hello", "no")]
        record = {"chosen": texts[0], "rejected": texts[1]}
        rejected = [*system, TALK[0], message("assistant", "no")]
        assert examples(record)[1] == [([*system, *TALK], 1), (rejected, 0)]


def test_replies_to_different_prompts_are_no_pair():
    other = [message("user", "ho"), message("assistant", "no")]
    assert examples({"chosen": TALK, "rejected": other})[1] == []


@pytest.mark.parametrize("weight", [0, 1])
def test_a_label_decides_whatever_the_weight_is(weight):
    talk = [*TALK, TALK[0], message("assistant", "bye", weight=weight)]
    [(messages, label)] = examples({"messages": talk, "label": 1})[1]
    ids, mask = retry.render(TOKENIZER, messages, label)
    learned = [token for token, learned in zip(ids, mask, strict=True) if learned]
    assert TOKENIZER.decode(learned) == " bye<|endoftext|>"


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"instruction": "hi", "output": "hello"},
        {"messages": TALK},
    ],
)
def test_a_label_goes_with_every_format(record):
    assert examples(record | {"label": 1})[1] == [(TALK, 1)]


def test_the_first_text_of_a_record_is_taken():
    record = {"text": "[Human]: hi", "input_ids": [1, 2], "label": 1}
    assert examples(record)[1] == [("[Human]: hi", 1)]


def test_a_pair_with_images_is_refused():
    with pytest.raises(ValueError, match="images"):
        examples({"prompt": "hi", "chosen": "a", "rejected": "b", "images": ["a.jpg"]})


def test_a_reply_may_quote_a_speaker():
    record = {"prompt": "hi", "chosen": "hello", "rejected": "hello\n\nHuman: bye"}
    rejected = message("assistant", "hello\n\nHuman: bye")
    assert examples(record)[1][1] == ([message("user", "hi"), rejected], 0)


def test_a_prompt_in_anthropics_form_goes_before_its_reply():
    record = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " hello", "rejected": " no"}
    assert examples(record)[1] == [(TALK, 1), ([TALK[0], message("assistant", "no")], 0)]


@given(prompt=texts, completion=texts, label=st.booleans())
def test_a_completion_with_a_label_is_one_reply(prompt, completion, label):
    record = {"prompt": prompt, "completion": completion, "label": label}
    messages = reference("", [(prompt, completion, True)])
    expected = [(messages, int(label))] if completion.strip() else []
    assert examples(record)[1] == expected


# ---- ParlAI's formats

spoken = st.text("ab é?\n\t", max_size=8).map(str.strip)
sentences = st.text("ab é?", min_size=1, max_size=8).map(str.strip).filter(bool)
dialogs = st.tuples(
    st.lists(sentences, max_size=3), st.lists(st.tuples(spoken, spoken), min_size=1, max_size=3)
)


def escape(text):
    return text.replace("\n", "\\n").replace("\t", "\\t") or "__SILENCE__"


def opening(persona, number):
    sentences = persona if number == 1 else []
    return "".join(f"your persona: {sentence}\\n" for sentence in sentences)


def as_fbdialog(persona, exchanges):
    text = ""
    for number, (utterance, reply) in enumerate(exchanges, 1):
        text += f"{number} {opening(persona, number)}{escape(utterance)}\t{escape(reply)}\n"
    return text


def as_parlai(persona, exchanges):
    text = ""
    for number, (utterance, reply) in enumerate(exchanges, 1):
        field = "labels" if number % 2 else "eval_labels"
        text += f"text:{opening(persona, number)}{escape(utterance)}\t{field}:{escape(reply)}"
        text += "\tepisode_done:True\n\n" if number == len(exchanges) else "\n"
    return text


@pytest.mark.parametrize("write", [as_fbdialog, as_parlai])
@given(talks=st.lists(dialogs, max_size=3))
def test_parlais_formats_are_read_as_they_were_written(write, talks):
    lines = "".join(write(*talk) for talk in talks).splitlines(keepends=True)
    read = [
        (persona, [exchange[:2] for exchange in exchanges])
        for persona, exchanges in parlai.dialogs(lines, "dump.txt")
    ]
    assert read == talks


# ---- ELI5 and plain text

maybe = st.none() | texts
answers = st.lists(st.tuples(maybe, st.none() | st.integers(-9, 9)), max_size=4)


@given(title=maybe, selftext=maybe, answers=st.none() | answers)
def test_eli5_takes_the_first_of_the_best_answers_and_null_is_empty(title, selftext, answers):
    columns = answers and {"text": [a[0] for a in answers], "score": [a[1] for a in answers]}
    record = {"q_id": "q7", "title": title, "selftext": selftext, "answers": columns or None}
    question = "\n".join(filter(None, [(title or "").strip(), (selftext or "").strip()]))
    best = None
    for text, score in answers or []:
        text = (text or "").strip()
        usable = text not in ("", "[deleted]", "[removed]") and "URL_" not in text
        if usable and (best is None or (score or 0) > best[0]):
            best = (score or 0, text)
    if question and best:
        messages = [message("user", question), message("assistant", best[1])]
        assert eli5.as_messages(record) == ("q7", messages)
    else:
        assert eli5.as_messages(record) is None


words = st.text("ab é", min_size=1, max_size=6).map(str.strip).filter(bool)
documents = st.lists(st.lists(st.lists(words, min_size=1), min_size=1), min_size=1, max_size=4)


@given(
    documents=documents,
    border=st.sampled_from(["\n<|endoftext|>\n", " <|endoftext|> ", None]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_text_is_its_documents_paragraphs(tmp_path_factory, documents, border, newline):
    folder = tmp_path_factory.mktemp("books")
    texts = ["\n\n".join(map("\n".join, paragraphs)) for paragraphs in documents]
    for number, content in enumerate(texts if border is None else [border.join(texts)]):
        name = f"{number}.TXT" if number % 2 else f"{number}.txt"
        (folder / name).write_text(content, encoding="utf-8", newline=newline)
    read = [each for _, each in plain_text.paragraphs(plain_text.lines_of(folder))]
    expected = []
    for number, paragraphs in enumerate(documents):
        expected += [(number, " ".join(lines)) for lines in paragraphs]
    assert read == expected
