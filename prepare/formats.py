"""The formats that people have conversations in, recognised by their fields:

messages       OpenAI's fine-tuning format: role, content (text or parts), weight
conversations  ShareGPT: from and value
dialog, data   DailyDialog, UltraChat: texts, the user's first
instruction    Alpaca: input, output, history; Dolly: context, response
prompt         prompt and completion, texts or messages

A "system" next to these is the persona. A reply with weight 0, or train or training false, is
context and not learned.
"""

from collections import Counter

FORMATS = {  # field that tells a format -> its name in the report
    "messages": "OpenAI's messages",
    "conversations": "ShareGPT's conversations",
    "conversation": "ShareGPT's conversations",
    "dialog": "dialogs of texts",
    "instruction": "instructions with outputs",
    "prompt": "prompts with completions",
}
HUMANS = ("user", "human", "prompter", "customer")
BOTS = ("assistant", "gpt", "bot", "chatgpt", "chatbot", "model", "ai", "bing", "bard")
ROLES = {  # name -> role
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(HUMANS, "user"),
    **dict.fromkeys(BOTS, "assistant"),
}
USUAL_ROLES = ("user", "assistant")  # names that are roles
TOOLS = ("tool", "function", "function_call", "observation", "tool_call", "tool_response")


def conversation(record):
    """Return (format, messages, number of blank replies) of a record. A message has role, content
    and, if it is a reply that is not learned, weight 0. Text is stripped, blank messages are
    dropped, and all that the system says comes first. Raises ValueError with the field or message
    that a model here cannot learn from."""
    name, turns = turns_of(record)
    refuse_images(record, "the record")

    # the persona first, then the turns
    personas = [as_text(record.get(name), name) for name in ("system", "system_prompt")]
    messages = []
    n_blank = 0  # replies
    for number, turn in enumerate(turns, 1):  # messages count from 1 in the report
        message = as_message(turn, number)
        if message["role"] == "system":
            personas.append(message["content"])
        elif message["content"]:
            messages.append(message)
        else:
            n_blank += message["role"] == "assistant"
    persona = "\n".join(dict.fromkeys(filter(None, personas)))  # each text once
    if persona:
        messages.insert(0, {"role": "system", "content": persona})
    return FORMATS[name], messages, n_blank


class ConversationReader:
    """Reads records, and counts what they were."""

    def __init__(self):
        self.counts = Counter()  # records of each format
        self.n_blank = 0  # replies

    def __call__(self, record):
        """Return (key, messages) of a record, None if it has no reply to learn. Equal conversations
        have equal keys, whatever other fields differ."""
        for field in ("label", "labels", "weight"):
            if record.get(field) in (0, "0"):
                raise ValueError(f"{field} is 0: read replies that were rejected with retry.py")
        name, messages, n_blank = conversation(record)
        self.counts[name] += 1
        self.n_blank += n_blank
        if not n_learned(messages):
            return None
        return "\0".join([m["role"] + "\0" + m["content"] for m in messages]), messages

    def report(self):
        """Return in one line what was read."""
        formats = ", ".join(f"{name} ({n:,})" for name, n in self.counts.items()) or "nothing"
        return f"recognised {formats}; left out {self.n_blank:,} blank replies"


def turns_of(record):
    """Return (field that tells the format, turns)."""
    for name in ("messages", "conversations", "conversation"):
        if isinstance(record.get(name), list):
            return name, record[name]
    if "instruction" in record:
        return "instruction", alpaca(record)
    if "completion" in record:
        prompt = as_turns(record.get("prompt"), "user")
        context = [turn | {"weight": 0} for turn in prompt]  # its replies are not learned
        return "prompt", context + as_turns(record["completion"], "assistant")
    for name in ("dialog", "data"):
        if isinstance(record.get(name), list):
            turns = []
            for text in record[name]:
                if not isinstance(text, str):
                    raise ValueError(f"{name} is not a list of texts: {text!r:.40}")
                turns += as_turns(text, "assistant" if len(turns) % 2 else "user")
            return "dialog", turns
    fields = ", ".join(map(str, record)) or "none"
    raise ValueError(f"no conversation in the fields {fields}; see --help for the formats")


def n_learned(messages):
    """Return the number of replies that a model learns from."""
    replies = [message for message in messages if message["role"] == "assistant"]
    return sum(message.get("weight", 1) != 0 for message in replies)


def as_message(turn, number):
    """Return a turn of any format as a message."""
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is not an object: {turn!r:.40}")
    content = turn.get("content")
    role = turn.get("role")
    if role in USUAL_ROLES and isinstance(content, str) and len(turn) == 2:
        return {"role": role, "content": content.strip()}  # the usual case, in half the time

    name = role or turn.get("from")
    lower = name.lower() if isinstance(name, str) else None
    role = ROLES.get(lower)
    if lower in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"message {number} calls a tool, which GPT-2 cannot learn here")
    if role is None:
        raise ValueError(f"message {number} has role {name!r}, not system, user or assistant")
    refuse_images(turn, f"message {number}")
    if "content" not in turn and "value" not in turn:
        raise ValueError(f"message {number} has no content")
    content = turn.get("value") if content is None else content
    message = {"role": role, "content": as_text(content, "message", number)}
    for flag in ("weight", "train", "training", "loss"):
        value = turn.get(flag)
        if value not in (None, 0, 1):  # false is 0, true is 1
            raise ValueError(f"message {number} has {flag} {value!r}, not 0 or 1")
        if value == 0 and role == "assistant":
            message["weight"] = 0  # context, not learned
    return message


def refuse_images(record, name):
    for field in ("image", "images"):
        if record.get(field):
            raise ValueError(f"{name} has {field}, which GPT-2 cannot read")


def as_text(content, name, number=""):
    """Return a text or its parts, stripped; null is empty."""
    if isinstance(content, str):
        return content.strip()
    if content is None:
        return ""
    name = f"{name} {number}".strip()
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise ValueError(f"{name} is not a text: {content!r:.40}")
    text = ""
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise ValueError(f"{name} has a part of type {part['type']!r}, which is not text")
        part = part.get("text") if isinstance(part, dict) else part
        if not isinstance(part, str):
            raise ValueError(f"{name} is not a text: {part!r:.40}")
        text += part
    return text.strip()


def as_turns(value, role):
    """Return a text, a turn or a list of turns as a list."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [value]
    turns = value if isinstance(value, list) else [{"role": role, "content": value}]
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a message is not an object: {turn!r:.40}")
    return turns


def alpaca(record):
    """Return the messages of a record: the history, then the instruction with its input, then the
    output."""
    turns = []
    for pair in record.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history is not a list of [user, assistant]: {pair!r:.40}")
        turns += as_turns(pair[0], "user") + as_turns(pair[1], "assistant")
    texts = [record["instruction"], record.get("input", record.get("context"))]
    parts = [as_text(text, "instruction") for text in texts]
    turns += as_turns("\n".join(filter(None, parts)), "user")
    if "output" not in record and "response" not in record:
        raise ValueError("there is an instruction without output or response")
    return turns + as_turns(record.get("output", record.get("response")), "assistant")
