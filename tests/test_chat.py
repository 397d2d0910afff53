"""chat.py and sample.py: piped, at a terminal, and with a model whose every word is given."""

import functools
import io
import os
import random
import re
import select
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_refused
from forked import Forked
from transformers import GPT2LMHeadModel

import chat
import sample
from model import GPT, GPTConfig
from nanochatgpt import configurator, engine
from nanochatgpt.checkpoint import load_model, save_model
from nanochatgpt.tokenizer import Tokenizer
from prepare import jsonl
from prepare.records import read_records

TOKENS = {Tokenizer().token_bytes(i): i for i in range(50256)}
COMMANDS = ("/help", "/reset", "/persona", "/retry", "/save", "/quit")


load_once = functools.cache(load_model)  # chats do not change their model


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    """In an empty folder; on one thread, since a tiny model is faster so."""
    monkeypatch.setattr(chat, "load_model", load_once)
    monkeypatch.setattr(sample, "load_model", load_once)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Make a checkpoint with random weights: directory(block_size, template) -> its path."""

    def make(block_size=128, template="human_bot"):
        folder = tmp_path_factory.getbasetemp() / f"{template}-{block_size}"
        if not folder.exists():
            torch.manual_seed(0)
            tokenizer = Tokenizer(template)
            save_model(GPT(GPTConfig(block_size, tokenizer.n_vocab, 2, 2, 32)), tokenizer, folder)
        return str(folder)

    return make


@pytest.fixture
def config(directory):
    """Make a chat.Config: config(block_size=64, template=..., seed=...) -> Config of a tiny model's
    chat."""

    def make(block_size=128, template="human_bot", **knobs):
        knobs = {"max_new_tokens": 12, "device": "cpu"} | knobs
        return chat.Config(**{"init_from": directory(block_size, template)} | knobs)

    return make


@pytest.fixture
def says(monkeypatch):
    """Put ids in the model's mouth: says(ids); it must not be asked for more."""

    def script(ids):
        ids = iter(ids)
        monkeypatch.setattr(engine, "draw_token", lambda *_: torch.tensor([next(ids)]))

    return script


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the model is given from now on, as ids."""
    given, stream = [], chat.stream

    def recording(engine, tokenizer, prompt, options, **add):
        given.append(prompt)
        return stream(engine, tokenizer, prompt, options, **add)

    monkeypatch.setattr(chat, "stream", recording)
    return given


@pytest.fixture
def hold(monkeypatch, capsys):
    """Hold a conversation: hold(config, text or bytes) -> what is shown, piped or at a terminal."""

    class Keyboard(io.StringIO):
        def isatty(self):
            return True

    def run(config, said, terminal=False):
        said = said if isinstance(said, bytes) else said.encode()
        stdin = io.TextIOWrapper(io.BytesIO(said), encoding="utf-8")
        if terminal:
            stdin = Keyboard(said.decode())
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        chat.main(config)
        return capsys.readouterr().out

    return run


@pytest.fixture
def at_terminal(config, hold):
    """Type lines at a terminal: at_terminal("hello", "/quit", **knobs) -> what is shown."""
    return lambda *lines, **knobs: hold(
        config(**knobs), "".join(line + "\n" for line in lines), terminal=True
    )


def spelled(text, seed):
    """Return ids of `text` in an unusual spelling: cut at random places, even within characters,
    and encoded."""
    choose, data, ids = random.Random(seed), text.encode(), []
    while data:
        lengths = [n for n in range(1, 8) if data[:n] in TOKENS]
        n = choose.choice(lengths)
        ids.append(TOKENS[data[:n]])
        data = data[n:]
    return ids


# --- piped ----------------------------------------------------------------------------------------


def test_a_script_of_messages_is_answered_line_by_line_and_alike_each_time(
    directory, config, hold, tmp_path
):
    said = "hello\n\n   \nhow are you?\nbye"
    knobs = [f"--init_from={directory()}", "--max_new_tokens=12", "--device=cpu"]
    done = Forked(["chat.py", *knobs], tmp_path, input=said).wait()
    assert (done.returncode, done.stderr) == (0, "")
    replies = done.stdout.splitlines()
    assert len(replies) == 3 and all(re.match("Bot: .", line) for line in replies)
    assert hold(config(), said) == done.stdout
    assert hold(config(seed=2), said) != done.stdout


def test_the_same_message_gets_another_answer_the_second_time(config, hold):
    first, second = hold(config(temperature=1.0), "hello\nhello\n").splitlines()
    assert first != second


def test_no_message_gets_no_answer(config, hold):
    assert hold(config(), "") == hold(config(), "\n \n") == ""


def test_no_standard_input_is_no_message(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)  # as in `chat.py <&-`
    chat.main(config())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "line",
    [b"caf\xe9 \xff\xfe\x80", b"\x00\x01", "🙂 ​﷽".encode(), b"x" * 10_000,
     b"word " * 20_000, b"[Bot]:\r"],
    ids=["not utf-8", "control characters", "emoji", "a long word", "a long message", "a marker"],
)  # fmt: skip
def test_whatever_the_line_holds_it_gets_one_answer(line, config, hold):
    answers = hold(config(), line + b"\nhello\n").splitlines()
    assert [answer[:5] for answer in answers] == ["Bot: ", "Bot: "]


@pytest.mark.parametrize("template", ["human_bot", "user_assistant"])
def test_after_any_number_of_messages_the_prompt_is_the_persona_and_the_newest_whole_exchanges(
    template, config, hold, prompts
):
    said = [f"message {i}" + " and so on" * (i % 4) for i in range(80)]
    c = config(block_size=64, template=template, max_new_tokens=4, persona="i am a zookeeper.")
    replies = [line.removeprefix("Bot: ") for line in hold(c, "\n".join(said)).splitlines()]
    whole = []
    for message, prompt, reply in zip(said, prompts, replies, strict=True):
        assert len(prompt) + c.max_new_tokens <= 64
        persona, *turns = Tokenizer(template).parse(prompt)
        assert persona == {"role": "system", "content": "i am a zookeeper."}
        whole.append({"role": "user", "content": message})
        on_one_line = [{**turn, "content": " ".join(turn["content"].split())} for turn in turns]
        assert on_one_line == whole[-len(turns) :] and turns[0]["role"] == "user"
        whole.append({"role": "assistant", "content": reply})
    assert max(len(Tokenizer(template).parse(prompt)) for prompt in prompts) > 3


def test_a_persona_is_either_refused_at_the_start_or_leaves_room_to_answer(config, hold):
    accepted = []
    for n in range(30, 46, 5):
        c = config(block_size=64, persona="a" + " tea" * n)
        try:
            chat.Chat(c)
        except ValueError as error:
            assert "persona" in str(error)
        else:
            accepted.append(n)
            assert hold(c, "hello\n").startswith("Bot: ")
    assert 30 in accepted and 45 not in accepted


def test_mistakes_end_in_a_sentence_and_status_2(as_main):
    assert_refused(as_main("chat.py", "--init_from=nowhere", input="hi"), "nowhere")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"persona": "tea " * 200}, "persona"),
        ({"max_new_tokens": 128}, "max_new_tokens=128"),
        ({"max_new_tokens": 126}, "max_new_tokens=126"),  # no room for a message
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "int4"}, "int4"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"init_from": "out/chat"}, "out/chat"),
    ],
    ids=str,
)
def test_a_knob_that_cannot_be_is_refused_by_name(knobs, words, config, hold):
    with pytest.raises((ValueError, OSError)) as refused:
        hold(config(**knobs), "hello\n")
    assert words in str(refused.value) and str(refused.value).count("\n") <= 1


def test_a_screen_that_cannot_show_every_character_does_not_end_the_chat(config, says, monkeypatch):
    says([*Tokenizer().encode(" some ☕ or tea"), 50256])
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    monkeypatch.setattr(sys, "stdout", screen)
    knobs = [f"--init_from={config().init_from}", "--max_new_tokens=12", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["chat.py", *knobs])
    configurator.run(chat.main, chat.Config)
    assert screen.buffer.getvalue() == b"Bot: some ? or tea\n"


# --- what the model says, and what is shown of it -------------------------------------------------


def test_a_reply_ends_at_its_end_token_and_loses_the_white_space_around_it(config, says):
    tokenizer = Tokenizer()
    says([*tokenizer.encode(" \n hello  there \n\n"), tokenizer.eos_id])
    bot = chat.Chat(config())
    assert "".join(bot.reply("hi")) == "hello  there"
    assert bot.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello  there"},
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("marker", ["\n[Human]:", "[Bot]:", "\n\n[Persona]:"])
def test_a_reply_ends_where_another_turn_begins_however_that_is_spelled(marker, seed, config, says):
    says(spelled(f" dots […] 🙂 [Hum] are fine{marker} no more", seed))
    bot, shown = chat.Chat(config(max_new_tokens=100)), ""
    for piece in bot.reply("hi"):
        shown += piece
        # no part of a marker or of a character, ever
        assert "dots […] 🙂 [Hum] are fine".startswith(shown)
    assert shown == bot.messages[-1]["content"] == "dots […] 🙂 [Hum] are fine"


def test_in_the_other_template_a_reply_ends_at_any_of_its_tokens(config, says):
    tokenizer = Tokenizer("user_assistant")
    for token in tokenizer.special_ids.values():
        says([*tokenizer.encode(" fine "), token])
        assert "".join(chat.Chat(config(template="user_assistant")).reply("hi")) == "fine"


@pytest.mark.parametrize("cut", ["\n[Human", "\n[", " [Bot]", "\n"])
def test_a_reply_that_ends_at_its_longest_within_a_marker_shows_no_part_of_it(cut, config, says):
    ids = Tokenizer().encode(" fine" + cut)
    says(ids)
    bot = chat.Chat(config(max_new_tokens=len(ids)))
    assert "".join(bot.reply("hi")) == bot.messages[-1]["content"] == "fine"


def test_a_reply_that_ends_at_its_longest_within_a_character_shows_no_part_of_it(config, says):
    ids = spelled(" fine 🙂", seed=0)[:-1]
    assert Tokenizer().decode(ids).endswith("\ufffd")
    says(ids)
    assert "".join(chat.Chat(config(max_new_tokens=len(ids))).reply("hi")) == "fine"


def test_a_bracket_that_ends_a_reply_is_shown(config, says):
    says([*Tokenizer().encode(" fine ["), Tokenizer().eos_id])
    assert "".join(chat.Chat(config()).reply("hi")) == "fine ["


def test_a_reply_that_is_cut_short_is_remembered_as_far_as_it_was_shown(config, says):
    says(Tokenizer().encode(" one two three"))
    bot = chat.Chat(config())
    reply = bot.reply("hi")
    shown = next(reply) + next(reply)
    reply.close()
    assert shown == "one two"
    assert bot.messages[-1] == {"role": "assistant", "content": "one two"}


def test_an_answer_on_several_lines_is_one_line_when_piped(config, hold, says):
    says([*Tokenizer().encode(" one\ntwo\r\n\n three\u2028four"), 50256])
    assert hold(config(), "hi\n") == "Bot: one two three four\n"


def test_the_model_is_given_the_conversation_as_training_writes_it(config, says, prompts):
    bot = chat.Chat(config(persona="i like tea."))
    for message, answer in (("hi", " hello\n"), ("tea?", "  yes, please"), ("bye", "")):
        says([*Tokenizer().encode(answer), 50256])
        list(bot.reply(message))
    text = "[Persona]: i like tea.\n[Human]: hi\n[Bot]: hello<|endoftext|>"
    text += "\n[Human]: tea?\n[Bot]: yes, please<|endoftext|>"
    assert Tokenizer().decode(prompts[-1]) == text + "\n[Human]: bye\n[Bot]:"
    assert prompts[-1] == Tokenizer().render(bot.messages[:-1], add_generation_prompt=True)[0]


# --- at a terminal --------------------------------------------------------------------------------


def test_the_greeting_says_what_one_talks_to_and_how_to_get_help(at_terminal, directory):
    shown = at_terminal()
    assert directory() in shown and "context 128" in shown and "/help" in shown


@pytest.mark.parametrize("line", ["/help", "/nonsense", "/save", "/"])
def test_help_and_an_unknown_command_list_the_commands(line, at_terminal):
    lines = at_terminal(line).splitlines()
    assert all(any(line.startswith(("You: " + name, name)) for line in lines) for name in COMMANDS)


def test_each_message_is_answered_and_an_empty_line_is_not(at_terminal):
    shown = at_terminal("hello", "", "  ", "bye")
    assert shown.count("Bot: ") == 2 and shown.count("You: ") == 5


def test_it_is_said_when_the_oldest_messages_are_out_of_sight(at_terminal):
    shown = at_terminal(*["hello there"] * 8, block_size=64)
    said = [int(n) for n in re.findall(r"oldest (\d+) messages", shown)]
    assert 1 <= len(said) < 8 and sorted(said) == said
    assert "oldest" not in at_terminal("hello", "bye")


def test_retry_gives_another_answer_to_the_last_message(at_terminal, prompts):
    shown = at_terminal("hello", "bye", "/retry", temperature=1.0)
    answers = [line.split("Bot: ")[1] for line in shown.splitlines() if "Bot: " in line]
    assert len(set(answers)) == 3
    assert prompts[1] == prompts[2] != prompts[0]


def test_retry_needs_a_message(at_terminal):
    shown = at_terminal("/retry", "hello", "/reset", "/retry")
    assert shown.count("no message") == 2 and shown.count("Bot: ") == 1


def test_reset_forgets_the_conversation_but_not_the_persona(at_terminal, prompts):
    at_terminal("hello", "/reset", "bye", persona="i like tea.")
    assert Tokenizer().decode(prompts[-1]) == "[Persona]: i like tea.\n[Human]: bye\n[Bot]:"


def test_a_persona_can_be_given_shown_changed_and_taken_away(at_terminal, prompts):
    lines = ["/persona", "/persona i like tea.", "hello", "/persona i am a dog.", "hi"]
    shown = at_terminal(*lines, "/persona -", "bye").splitlines()
    answers = [line[5:] for line in shown if line.startswith("You: ") and "Bot" not in line]
    assert answers == ["no persona", "i like tea.", "i am a dog.", "no persona", ""]
    texts = [Tokenizer().decode(prompt) for prompt in prompts]
    assert texts[0] == "[Persona]: i like tea.\n[Human]: hello\n[Bot]:"
    assert texts[1].startswith("[Persona]: i am a dog.\n[Human]: hello\n[Bot]: ")
    assert texts[2].startswith("[Human]: hello\n[Bot]: ") and texts[2].endswith(
        "\n[Human]: bye\n[Bot]:"
    )


def test_a_persona_that_is_too_long_is_refused_and_the_chat_goes_on(at_terminal, prompts):
    shown = at_terminal("/persona i like tea.", "/persona " + "tea " * 200, "hello")
    assert "persona is too long" in shown
    assert Tokenizer().decode(prompts[0]).startswith("[Persona]: i like tea.\n")


def test_saved_conversations_are_lines_that_prepare_reads(at_terminal):
    shown = at_terminal(
        "hello ☕", "/save talk.jsonl", "bye", "/save  talk.jsonl", persona="i like tea."
    )
    assert shown.count("saved to talk.jsonl") == 2
    (_, first), (_, second) = read_records(Path("talk.jsonl"), jsonl.parse)
    assert [message["content"] for message in first[:2]] == ["i like tea.", "hello ☕"]
    roles = " ".join(message["role"] for message in second)
    assert roles == "system user assistant user assistant"
    assert second[:3] == first


@pytest.mark.parametrize("persona", ["", "i like tea."])
def test_a_conversation_that_has_not_begun_is_not_saved(persona, at_terminal):
    at_terminal("/save talk.jsonl", "hello", "/save talk.jsonl", persona=persona)
    assert len(list(read_records(Path("talk.jsonl"), jsonl.parse))) == 1


def test_a_file_that_cannot_be_written_does_not_end_the_chat(at_terminal):
    shown = at_terminal(
        "hello", "/save no/such/folder/talk.jsonl", "/save ~nobody-of-this-name/talk.jsonl", "bye"
    )
    assert "No such file or directory" in shown and shown.count("Bot: ") == 2


def test_quit_and_the_end_of_input_end_the_chat(at_terminal):
    assert at_terminal("/quit", "hello").count("You: ") == 1
    assert at_terminal("hello").endswith("You: \n")


class Terminal:
    """chat.py in a process of its own, at a terminal."""

    def __init__(self, *arguments):
        self.screen, self.side = os.openpty()
        command = ["chat.py", *arguments]
        env = {"TERM": "dumb"}
        self.process = Forked(command, Path.cwd(), env, terminal=os.ttyname(self.side))
        self.shown = b""

    def type(self, text):
        os.write(self.screen, text.encode())

    def until(self, text):
        """Return what is shown from here to `text`, which must come within a minute."""
        while text.encode() not in self.shown:
            assert select.select([self.screen], [], [], 60)[0], self.shown
            self.shown += os.read(self.screen, 4096)
        before, _, self.shown = self.shown.partition(text.encode())
        return before.decode()


@pytest.fixture
def terminal(directory):
    knobs = ["--max_new_tokens=4000", "--repetition_penalty=1.5", "--device=cpu"]
    terminal = Terminal(f"--init_from={directory(4096)}", *knobs)
    yield terminal
    terminal.process.kill()
    os.close(terminal.screen)
    os.close(terminal.side)


def test_a_reply_streams_ctrl_c_cuts_it_short_the_chat_goes_on_and_ctrl_d_ends_it(terminal):
    assert "context 4096" in terminal.until("You: ")
    for message in ("hello", "and then?"):
        terminal.type(message + "\n")
        terminal.until("Bot: ")
        first_word = terminal.until(" ")
        assert first_word.strip()
        terminal.process.send_signal(signal.SIGINT)  # as the terminal does at Ctrl-C
        rest = terminal.until("\r\nYou: ")
        assert len(Tokenizer().encode(rest)) < 3000  # 4000 would be whole
    terminal.type("/save talk.jsonl\n")
    terminal.until("saved to talk.jsonl")
    ((_, messages),) = read_records(Path("talk.jsonl"), jsonl.parse)
    assert [messages[i]["content"] for i in (0, 2)] == ["hello", "and then?"]
    assert messages[-1]["content"].startswith(first_word.strip())
    terminal.until("You: ")
    terminal.type("\x04")
    assert terminal.process.wait(60).returncode == 0


# --- sample.py ------------------------------------------------------------------------------------


@pytest.fixture
def continued(directory, capsys):
    """Run sample.py's main: continued(start=...) -> what it prints."""

    def run(block_size=128, **knobs):
        knobs = {"max_new_tokens": 12, "device": "cpu"} | knobs
        sample.main(sample.Config(init_from=directory(block_size), **knobs))
        return capsys.readouterr().out

    return run


def test_a_prompt_is_continued_as_transformers_does(continued, directory):
    prompt = torch.tensor([Tokenizer().encode("The dog")])
    model = GPT2LMHeadModel.from_pretrained(directory())
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=50256)[0]
    assert continued(start="The dog", temperature=0) == Tokenizer().decode(ids.tolist()) + "\n"


def test_samples_follow_from_the_seed_and_differ(continued):
    shown = continued(start="The dog", num_samples=3)
    samples = shown.split("-" * 20)
    assert len({text.strip() for text in samples}) == 3
    assert all(text.strip().startswith("The dog") for text in samples)
    assert continued(start="The dog", num_samples=3) == shown
    assert continued(start="The dog", num_samples=3, seed=1) != shown
    assert continued(start="The dog") == samples[0]


def test_an_empty_prompt_is_continued_too(continued):
    assert continued(start="").strip()


def test_a_continuation_ends_with_the_context(continued):
    text = continued(block_size=64, max_new_tokens=1000, temperature=0)
    assert len(Tokenizer().encode(text)) < 2 * 64


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"start": "tea " * 200}, "prompt"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
    ids=["temperature", "max_new_tokens", "start", "device"],
)
def test_an_option_out_of_range_is_refused_by_name(knobs, words, continued):
    with pytest.raises(ValueError, match=words):
        continued(**knobs)


def test_sampling_from_nothing_ends_in_a_sentence_and_status_2(as_main):
    assert_refused(as_main("sample.py", "--init_from=no/model/here"), "no/model/here")
