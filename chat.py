"""Talk to a model: python chat.py --init_from=out/chat [--persona="i am a zookeeper."]

When the input is not a terminal, each line is a message and gets one line "Bot: ..." in answer.
"""

import contextlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass

from nanochatgpt.checkpoint import default_model, load_model
from nanochatgpt.configurator import at_least, run
from nanochatgpt.device import pick_device, pick_dtype
from nanochatgpt.engine import Engine
from nanochatgpt.files import naming
from nanochatgpt.generate import stream
from nanochatgpt.sampling import ChatSampling, for_template
from nanochatgpt.stream import Trim
from nanochatgpt.tokenizer import fit_context

COMMANDS = """\
/help            show this list
/reset           forget the conversation, keep the persona
/persona [TEXT]  show the bot's persona, or change it; /persona - removes it
/retry           answer the last message again
/why             show the replies that the last one was chosen from, with --best_of
/save FILE       append the conversation to FILE as a JSON line for prepare/jsonl.py and retry.py
/quit            end the chat, as Ctrl-D does; Ctrl-C cuts an answer short

A line that ends with \\ goes on in the next one; a paste of several lines is one message."""


@dataclass
class Config(ChatSampling):
    init_from: str = default_model()  # nano, a directory, gpt2..., distilgpt2, org/name on the hub
    persona: str = ""  # who the bot is, in sentences: "i am a zookeeper. i like tea."
    best_of: int = 1  # generate N replies, say the one the reward model scores highest
    reward: str = ""  # with best_of: a reward model, a directory or org/name on the hub
    seed: int = 1337  # the same seed and messages give the same replies
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8


class Chat:
    """A conversation with a model: a persona and the turns of both sides."""

    def __init__(self, config):
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device, inference=True)
        at_least(1, config, "best_of")
        if (config.best_of > 1) != bool(config.reward):
            knobs = f"best_of={config.best_of} with reward={config.reward or '(none)'}"
            raise ValueError(f"{knobs}: try --best_of=8 --reward=out/reward, or neither")
        # the model, with the sampling defaults of its template
        self.model, self.tokenizer = load_model(config.init_from, device, dtype, inference=True)
        self.config = for_template(config, self.tokenizer.template)
        if self.tokenizer.notice:
            print(self.tokenizer.notice, file=sys.stderr)
        self.reward_model = None
        if config.reward:
            from rlhf.reward_model import load_reward_model  # only with --reward

            options = (self.tokenizer, device, dtype)
            self.reward_model = load_reward_model(config.reward, *options, inference=True)

        # the engine keeps what earlier turns computed
        self.engine = Engine(self.model, config.best_of, n_vocab=self.tokenizer.n_vocab)
        self.n_replies = 0  # seeds the next reply
        self.reset()

        # the context must have room for a reply, the persona and a short message
        context = self.model.config.block_size
        self.room = context - config.max_new_tokens  # tokens for the prompt
        if not 1 <= config.max_new_tokens <= context - 16:
            problem = f"max_new_tokens={config.max_new_tokens} leaves no room for prompt or reply"
            raise ValueError(f"{problem} in a context of {context}; try {context // 2}")
        self.set_persona(config.persona)

    def reset(self):
        """Forget the conversation, but for the persona."""
        self.turns = []  # messages of both sides, without the persona
        self.retried = []  # replies that were taken back
        self.choice = []  # [(score, text)] that the last reply was chosen from
        self.dropped = 0  # oldest turns that the prompt leaves out

    @property
    def messages(self):
        """The conversation as Tokenizer.render takes it."""
        return self.system + self.turns

    def set_persona(self, persona):
        """Replace the persona; "" removes it. Raises ValueError if it is too long."""
        # try it with a short message before it replaces the old one
        system = [{"role": "system", "content": persona}] if persona else []
        fit_context(self.tokenizer, [*system, user("a")], self.room)
        self.system = system  # one message, or none

    def reply(self, message):
        """Yield the reply to a message in pieces, without white space around it; remember both. If
        the generator is closed, the reply is remembered as far as it went."""
        messages = [*self.messages, user(message)]  # the prompt is what fits of them
        prompt, self.dropped = fit_context(self.tokenizer, messages, self.room, self.dropped)
        self.turns.append(user(message))
        self.n_replies += 1
        reply = ""
        trim = Trim()
        try:
            for piece in self.generate(prompt):  # pieces may begin or end with spaces
                trimmed = trim.push(piece)
                reply += trimmed
                if trimmed:
                    yield trimmed
        finally:  # also after Ctrl-C, which closes this generator
            self.turns.append({"role": "assistant", "content": reply})

    def generate(self, prompt):
        """Return the pieces of a reply; with a reward model, a single piece: the best reply."""
        config = self.config
        tokenizer = self.tokenizer
        stops = {"stop_ids": tokenizer.stop_ids, "stop_strings": tokenizer.stop_strings}
        if self.reward_model is None:
            seed = config.seed + self.n_replies  # a /retry draws another reply
            return stream(self.engine, tokenizer, prompt, config, seed=seed, **stops)

        from rlhf.scoring import best_of  # only with --reward

        models = (self.engine, self.reward_model, tokenizer)
        seed = config.seed + self.n_replies * config.best_of  # candidate i draws with seed + i
        scored = best_of(*models, prompt, config.best_of, config, seed)  # the best first
        self.choice = [(score, tokenizer.decode(ids)) for score, ids in scored]
        # replies that were taken back in this place come last
        rejected = [r["content"] for r in self.retried if r["before"] == len(self.turns)]
        self.choice.sort(key=lambda pair: pair[1].strip() in rejected)
        return [self.choice[0][1]]

    def take_back(self):
        """Forget the last message and its reply; return the message, "" if there is none."""
        if not self.turns:
            return ""
        reply = self.turns.pop()["content"]
        if reply:  # an empty reply was interrupted, not rejected
            self.retried.append({"before": len(self.turns), "content": reply})
        return self.turns.pop()["content"]

    def cut_short(self):
        """Forget the last message if its reply is empty; after a /retry, restore the old reply."""
        if not self.turns or self.turns[-1]["content"]:
            return
        message = self.take_back()
        if self.retried and self.retried[-1]["before"] == len(self.turns) + 1:
            old = self.retried.pop()["content"]
            self.turns += [user(message), {"role": "assistant", "content": old}]

    def save(self, path):
        """Append the conversation to a file as one JSON line, with the replies that were taken back
        and the number of turns before each, for prepare/retry.py."""
        record = {"messages": self.messages}
        if self.retried:
            record["retried"] = self.retried
        # a persona from the command line may hold bytes that are not UTF-8: "?"
        with naming(path), open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def user(content):
    return {"role": "user", "content": content}


def command(chat, line):
    """Carry out a /command. Return the message to answer now, "" if there is none."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/quit":
        raise EOFError  # as Ctrl-D does
    elif name == "/reset":
        chat.reset()
        print("conversation cleared")
    elif name == "/persona":
        if argument:  # without text, show it only
            chat.set_persona("" if argument == "-" else argument)
        print(chat.system[0]["content"] if chat.system else "no persona")
    elif name == "/retry":
        if chat.turns:
            return chat.take_back()  # `talk` answers it as a new message
        print("there is no message to answer again")
    elif name == "/why":
        if not chat.choice:
            print("no candidates to show: start with --best_of=8 --reward=DIR, and say something")
        # one line per candidate; equal ones are counted
        lines = [f"{score:7.3f}  {' '.join(text.split())}" for score, text in chat.choice]
        for line, n in Counter(lines).items():
            print(line if n == 1 else f"{line}  ({n} times)")
    elif name == "/save" and argument:
        if chat.turns:
            chat.save(os.path.expanduser(argument))
        print(f"saved to {argument}" if chat.turns else "there is nothing to save yet")
    else:
        print(COMMANDS)
    return ""


def read_message():
    """Return what is typed: a line, and the next one too if it ends with a backslash."""
    message = input("You: ")
    while message.endswith("\\"):
        message = message[:-1] + "\n" + input("...: ")
    return message.strip()


def talk(chat):
    """Hold a conversation at a terminal until its end of input."""
    with contextlib.suppress(ImportError):  # Windows lacks it
        import readline  # gives input() line editing and history

        readline.parse_and_bind("set enable-bracketed-paste on")  # the default since 8.1
    size = f"{chat.model.num_parameters() / 1e6:.0f}M parameters"
    print(f"{chat.config.init_from}: {size}, context {chat.model.config.block_size}. Try /help")
    while True:
        # read a message or a command
        try:
            message = read_message()
            # a paste may begin with a path: of several lines, only a known word is a command
            is_command = "\n" not in message or message.split()[0] in COMMANDS
            if message.startswith("/") and is_command:
                message = command(chat, message)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the chat")
            continue
        except (ValueError, OSError) as error:
            print(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error)
            continue
        if not message:
            continue

        # answer it
        dropped = chat.dropped
        try:
            print("Bot: ", end="", flush=True)
            # closing: on Ctrl-C the reply is remembered as far as it went
            with contextlib.closing(chat.reply(message)) as reply:
                for piece in reply:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            chat.cut_short()  # drops the message if no text came
        print()
        if chat.dropped > dropped:  # tell it once each time the prompt loses turns
            print(f"(context full: the model no longer sees the oldest {chat.dropped} messages)")


def main(config):
    chat = Chat(config)
    if sys.stdin is None:  # closed by the shell
        return
    sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 become U+FFFD
    if sys.stdin.isatty():
        talk(chat)
        return
    # one line in, one line out: white space in a reply becomes single spaces
    for message in filter(None, map(str.strip, sys.stdin)):
        print("Bot:", " ".join("".join(chat.reply(message)).split()), flush=True)


if __name__ == "__main__":
    run(main, Config)
