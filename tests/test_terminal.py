"""chat.py in a pseudo-terminal: what a person types, pastes and interrupts, key by key."""

import json
import os
import random
import select
import time
from pathlib import Path

import pytest
import torch
from forked import Forked

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.tokenizer import Tokenizer
from prepare import jsonl

# what a terminal sends
ENTER = "\r"
UP = "\x1b[A"
LEFT = "\x1b[D"
HOME = "\x01"
BACKSPACE = "\x7f"
CTRL_C = "\x03"
CTRL_D = "\x04"


class Terminal:
    """chat.py in a process and at a terminal of its own."""

    def __init__(self, *arguments):
        self.keys, side = os.openpty()
        command = ["chat.py", *arguments]
        self.process = Forked(command, Path.cwd(), {"TERM": "xterm"}, terminal=os.ttyname(side))
        self.shown = b""
        self.until("You: ")
        os.close(side)

    def type(self, keys):
        """Press keys, while the terminal shows what comes."""
        keys = keys if isinstance(keys, bytes) else keys.encode()
        while keys:
            readable, writable, _ = select.select([self.keys], [self.keys], [], 60)
            assert readable or writable, self.shown
            if readable:
                self.shown += os.read(self.keys, 4096)
            if writable:
                keys = keys[os.write(self.keys, keys[:512]) :]

    def paste(self, text):
        """Paste a text as terminals do: marked, each end of a line a carriage return."""
        text = text if isinstance(text, bytes) else text.encode()
        self.type(b"\x1b[200~" + text.replace(b"\n", b"\r") + b"\x1b[201~")

    def until(self, text):
        """Return what is shown from here to `text`, which must come within a minute."""
        while text.encode() not in self.shown:
            assert select.select([self.keys], [], [], 60)[0], self.shown
            self.shown += os.read(self.keys, 4096)
        before, _, self.shown = self.shown.partition(text.encode())
        return before.decode(errors="replace")

    def enter(self):
        """Press Enter and wait for the answer."""
        self.type(ENTER)
        self.until("Bot: ")
        self.until("You: ")

    def said(self):
        """Save the conversation; return what the user said in it."""
        self.type("/save talk.jsonl" + ENTER)
        self.until("saved to talk.jsonl")
        line = Path("talk.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")[-1]
        ((_, messages), *_) = jsonl.read(Path("talk.jsonl"))
        assert messages
        self.until("You: ")
        return [turn["content"] for turn in json.loads(line)["messages"] if turn["role"] == "user"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model with random weights and a long context."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = Tokenizer()
    save_model(GPT(GPTConfig(4096, tokenizer.n_vocab, 1, 2, 16)), tokenizer, folder)
    return str(folder)


@pytest.fixture
def terminal(model, tmp_path, monkeypatch):
    """Start chat.py: terminal(max_new_tokens=8) -> Terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    terminals = []

    def start(**knobs):
        knobs = {"init_from": model, "max_new_tokens": 8, "device": "cpu"} | knobs
        terminals.append(Terminal(*[f"--{name}={value}" for name, value in knobs.items()]))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.process.kill()
        os.close(terminal.keys)


def test_a_paste_of_several_lines_is_one_message(terminal):
    pasted = ["/home/nora\nis not a command", "a list:\n\n\t- tea\n\t- jam", "/reset is not\nhere"]
    t = terminal()
    for text in pasted[:2]:
        t.paste(text)
        t.enter()
    t.type("look: ")
    t.paste(pasted[2] + "\n")
    t.type("and more")
    t.enter()
    assert t.said() == [*pasted[:2], f"look: {pasted[2]}\nand more"]


def test_a_line_that_ends_with_a_backslash_goes_on_in_the_next(terminal):
    t = terminal()
    t.type("one\\" + ENTER)
    t.until("...: ")
    t.type("two\\" + ENTER)
    t.until("...: ")
    t.type("three \\ four")
    t.enter()
    t.type("/persona i like tea.\\" + ENTER)
    t.until("...: ")
    t.type("i have a dog." + ENTER)
    t.until("i like tea.\r\ni have a dog.")
    assert t.said() == ["one\ntwo\nthree \\ four"]


def test_bytes_that_are_not_utf_8_are_replaced_and_the_conversation_is_saved(terminal):
    t = terminal(persona=b"i like caf\xe9.".decode(errors="surrogateescape"))
    t.type(b"caf\xe9 \xff\xfe au lait")
    t.enter()
    t.paste(b"na\xefve\n\xc3\x28 \xed\xa0\x80")
    t.enter()
    t.type("fine ☕")
    t.enter()
    # readline itself may move or drop what looks like the first byte of a character
    said = t.said()
    assert "\ufffd" in said[0]
    texts = [text.replace("\ufffd", "") for text in said]
    assert texts == ["caf  au lait", "nave\n( ", "fine ☕"]


def test_arrows_edit_the_line_and_bring_back_earlier_messages(terminal):
    t = terminal()
    t.type("helo" + LEFT + "l")
    t.enter()
    t.paste("second\nmessage")
    t.enter()
    t.type(UP)
    t.enter()
    t.type(UP * 3 + HOME + "oh ")
    t.enter()
    assert t.said() == ["hello", "second\nmessage", "second\nmessage", "oh hello"]


def test_emoji_and_combining_characters_arrive_as_they_were_typed(terminal):
    texts = ["👩‍👩‍👧 ❤️ 🇺🇳", "e\u0301 n\u0303o a\u0308\u0304", "नमस्ते สวัสดี", "שלום مرحبا 你好"]
    t = terminal()
    for text in texts:
        t.type(text)
        t.enter()
    t.type("tea ☕🙂" + BACKSPACE)
    t.enter()
    assert t.said() == [*texts, "tea ☕"]


def test_ten_thousand_characters_typed_or_pasted_arrive_whole(terminal):
    choose = random.Random(0)
    letters = "abcdefghij klmno pqrst uvwxyz é🙂"
    typed = "a" + "".join(choose.choices(letters, k=9_998)) + "z"
    pasted = "a" + "".join(choose.choices(letters + "\n", k=9_998)) + "z"
    t = terminal()
    t.type(typed)
    t.enter()
    t.paste(pasted)
    t.enter()
    assert t.said() == [typed, pasted]


def test_ctrl_c_while_typing_drops_the_message(terminal):
    def press_ctrl_c():
        time.sleep(0.2)  # Python misses it between a key and its wait for the next one
        t.type(CTRL_C)

    t = terminal()
    t.type("hello")
    t.until("hello")
    press_ctrl_c()
    t.until("Ctrl-D")
    t.until("You: ")
    t.type("first\\" + ENTER)
    t.until("...: ")
    t.type("second")
    t.until("second")
    press_ctrl_c()
    t.until("You: ")
    t.type("bye")
    t.enter()
    assert t.said() == ["bye"]


def test_ctrl_c_cuts_an_answer_short_the_chat_goes_on_and_ctrl_d_ends_it(terminal):
    t = terminal(max_new_tokens=4000, repetition_penalty=1.5)
    for message in ("hello", "and then?"):
        t.type(message + ENTER)
        t.until("Bot: ")
        first_word = t.until(" ")
        assert first_word.strip()
        t.type(CTRL_C)
        rest = t.until("You: ")
        assert len(Tokenizer().encode(rest)) < 3000  # 4000 would be whole
    assert t.said() == ["hello", "and then?"]
    ((_, messages),) = jsonl.read(Path("talk.jsonl"))
    assert messages[-1]["content"].startswith(first_word.strip())
    t.type(CTRL_D)
    assert t.process.wait(60).returncode == 0


def test_ctrl_c_as_soon_as_the_message_is_sent_leaves_the_chat_as_it_was(terminal):
    t = terminal(max_new_tokens=2000)
    t.paste("tea " * 10_000)  # takes a moment to encode
    t.type(ENTER)
    t.until("Bot: ")
    t.type(CTRL_C)
    t.until("You: ")
    t.type("hello" + ENTER)
    t.until("Bot: ")
    t.until(" ")
    t.type(CTRL_C)
    t.until("You: ")
    assert t.said()[-1] == "hello"
