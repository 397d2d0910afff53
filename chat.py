"""Talk to a model: python chat.py --init_from=out/chat [--persona="i am a zookeeper."]

When the input is not a terminal, each line of it is a message and gets one line "Bot: ..." in answer.
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
from nanochatgpt.generate import stream
from nanochatgpt.sampling import ChatSampling, Sampling, for_template, options_of
from nanochatgpt.stream import Trim
from nanochatgpt.tokenizer import fit_context
from rlhf.reward_model import load_reward_model
from rlhf.scoring import best_of

COMMANDS = """\
/help            this list
/reset           forget the conversation, keep the persona
/persona [TEXT]  give the bot a persona, or show it; /persona - takes it away
/retry           another answer to your last message
/why             the replies that the last one was chosen from, with --best_of, and their scores
/save FILE       append the conversation to FILE, one JSON line, as prepare/jsonl.py and prepare/retry.py read it
/quit            or Ctrl-D; Ctrl-C cuts an answer short"""

SHORT = {"role": "user", "content": "a"}  # the least that must fit into the context


@dataclass
class Config(ChatSampling):
    init_from: str = (
        default_model()
    )  # nano, a directory, gpt2[-medium|-large|-xl], distilgpt2 or org/name on the hub
    persona: str = ""  # who the bot is, in sentences: "i am a zookeeper. i like tea."
    best_of: int = 1  # say the best of so many replies, by the score of `reward`
    reward: str = (
        ""  # with best_of: a reward model of train_reward.py, a directory or org/name on the hub
    )
    seed: int = 1337  # the same seed and messages give the same replies
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16, int8; auto is float16 on an x86 CPU, bfloat16 on CUDA


class Chat:
    """A conversation with a model: `messages` in the order they were said, the persona first if there is one."""

    def __init__(self, config):
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device, inference=True)
        at_least(1, config, "best_of")
        if (config.best_of > 1) != bool(config.reward):
            given = f"best_of={config.best_of} with reward={config.reward or '(none)'}"
            raise ValueError(
                f"{given}: the one needs the other, as in --best_of=8 --reward=out/reward"
            )
        self.model, self.tokenizer = load_model(config.init_from, device, dtype, inference=True)
        self.reward_model = None
        if config.reward:
            self.reward_model = load_reward_model(
                config.reward, self.tokenizer, device, dtype=dtype, inference=True
            )
        # keeps what the turns before have computed
        self.engine = Engine(self.model, config.best_of, n_vocab=self.tokenizer.n_vocab)
        self.choice = []  # [(score, text)] that the last reply was chosen from
        self.config, self.messages, self.replies = (
            for_template(config, self.tokenizer.template),
            [],
            0,
        )
        self.retried = []  # replies that were taken back
        self.dropped = 0  # so many of the oldest turns are out of the model's sight
        self.room = self.model.config.block_size - config.max_new_tokens
        if (
            self.room < len(self.tokenizer.render([SHORT], add_generation_prompt=True)[0])
            or config.max_new_tokens < 1
        ):
            context = self.model.config.block_size
            raise ValueError(
                f"max_new_tokens={config.max_new_tokens}: the context is {context} tokens, for both sides; "
                f"try --max_new_tokens={context // 2}"
            )
        self.set_persona(config.persona)

    def set_persona(self, persona):
        """Put `persona` before the conversation in place of the one there is; "" takes it away."""
        system = [{"role": "system", "content": persona}] if persona else []
        fit_context(self.tokenizer, [*system, SHORT], self.room)  # refuses one that is too long
        self.messages = system + [m for m in self.messages if m["role"] != "system"]

    def reply(self, message):
        """Yield the reply to `message` in pieces, without white space around it, and remember both.

        A reply that is cut short (by closing the generator) is remembered as far as it went.
        """
        c = self.config
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt, self.dropped = fit_context(self.tokenizer, messages, self.room, self.dropped)
        self.messages = messages
        self.replies += 1
        reply, trim = "", Trim()
        stops = {"stop_ids": self.tokenizer.stop_ids, "stop_strings": self.tokenizer.stop_strings}
        try:
            if self.reward_model:
                pieces = self.choose(prompt, **stops)
            else:
                pieces = stream(
                    self.engine, self.tokenizer, prompt, c, seed=c.seed + self.replies, **stops
                )
            for piece in pieces:
                if shown := trim.push(piece):
                    reply += shown
                    yield shown
        finally:
            self.messages.append({"role": "assistant", "content": reply})

    def choose(self, prompt, **stops):
        """Yield the best reply to a prompt, whole; another one than those that were taken back, if there is one."""
        c = self.config
        sampling = Sampling(**options_of(c))
        seed = c.seed + self.replies * c.best_of
        models = (self.engine, self.reward_model, self.tokenizer)
        found = best_of(*models, prompt, c.best_of, sampling, seed=seed, **stops)
        turns = sum(m["role"] != "system" for m in self.messages)
        before = {retried["content"] for retried in self.retried if retried["before"] == turns}
        texts = [(score, self.tokenizer.decode(ids)) for score, ids in found]
        # a reply that was taken back here comes last
        self.choice = sorted(texts, key=lambda pair: pair[1].strip() in before)
        yield self.choice[0][1]

    def take_back(self):
        """Forget the last message and its reply; return the message, "" if there is none."""
        if self.messages[-1:] and self.messages[-1]["role"] == "assistant":
            reply = self.messages.pop()["content"]
            if reply:
                before = sum(m["role"] != "system" for m in self.messages)
                self.retried.append({"before": before, "content": reply})
            return self.messages.pop()["content"]
        return ""

    def cut_short(self):
        """Forget the last message if nothing was said to it; a reply that was taken back for another is there again."""
        if self.messages[-1]["content"]:
            return
        before = sum(m["role"] != "system" for m in self.messages) - 1
        again = (
            self.retried.pop() if self.retried and self.retried[-1]["before"] == before else None
        )
        message = self.take_back()
        if again:
            self.messages.append({"role": "user", "content": message})
            self.messages.append({"role": "assistant", "content": again["content"]})

    def save(self, path):
        """Append the conversation to `path` as one JSON line, with the replies that were taken back, each with the
        number of turns before it: prepare/retry.py learns from both."""
        record = {"messages": self.messages} | ({"retried": self.retried} if self.retried else {})
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def command(chat, line):
    """Carry out a /command. Return the message to answer now, if there is one."""
    name, _, argument = (part.strip() for part in line.partition(" "))
    if name == "/reset":
        chat.messages, chat.retried, chat.dropped = (
            [m for m in chat.messages if m["role"] == "system"],
            [],
            0,
        )
        chat.choice = []
        print("forgotten")
    elif name == "/persona":
        if argument:
            chat.set_persona("" if argument == "-" else argument)
        print(next((m["content"] for m in chat.messages if m["role"] == "system"), "no persona"))
    elif name == "/retry":
        if message := chat.take_back():
            return message
        print("there is no message to answer again")
    elif name == "/why":
        times = Counter(" ".join(text.split()) for _, text in chat.choice)
        for text, n in times.items():
            score = next(score for score, found in chat.choice if " ".join(found.split()) == text)
            print(f"{score:7.3f}  {text}{f'  ({n} times)' * (n > 1)}")
        if not chat.choice:
            print("nothing was chosen: start with --best_of=8 --reward=DIR, and say something")
    elif name == "/save" and argument:
        if all(message["role"] != "assistant" for message in chat.messages):
            print("there is nothing to save yet")
        else:
            chat.save(os.path.expanduser(argument))
            print(f"saved to {argument}")
    elif name == "/quit":
        raise EOFError
    else:
        if name != "/help":
            print("/save needs a FILE" if name == "/save" else f"there is no {name}")
        print(COMMANDS)
    return ""


def talk(chat):
    """Hold a conversation at a terminal until its end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and history; not there on Windows)
    size, context = chat.model.num_parameters() / 1e6, chat.model.config.block_size
    print(
        f"{chat.config.init_from}: {size:.0f}M parameters, context {context}. /help lists commands"
    )
    while True:
        try:
            message = input("You: ").strip()
            if message.startswith("/"):
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
        print("Bot: ", end="", flush=True)
        dropped = chat.dropped
        try:
            with contextlib.closing(chat.reply(message)) as reply:
                for piece in reply:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            chat.cut_short()
        print()
        if chat.dropped > dropped:
            print(
                f"(the oldest {chat.dropped} messages are out of its sight now: the context is full)"
            )


def main(config):
    chat = Chat(config)
    if sys.stdin and sys.stdin.isatty():
        return talk(chat)
    if sys.stdin:
        sys.stdin.reconfigure(errors="replace")
    for line in sys.stdin or ():
        if message := line.strip():
            print("Bot:", " ".join("".join(chat.reply(message)).split()), flush=True)


if __name__ == "__main__":
    run(main, Config)
