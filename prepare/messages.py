"""
Check conversations that come from users.
"""


def problem(messages):
    """Return what is wrong with a conversation, None if nothing is."""
    if not isinstance(messages, list) or not messages:
        return 'not {"messages": [...]} with one message or more'
    # each message by itself; messages count from 1 in the report
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f"message {number} is not {{'role': ..., 'content': text}}"
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            return f"message {number} has role {role!r}, not system, user or assistant"
        if role == "system" and number > 1:  # the persona opens the conversation
            return f"message {number} is a system message, which can only come first"
    # training supervises the assistant's messages only
    if all(message["role"] != "assistant" for message in messages):
        return "no message is the assistant's, so there is nothing to learn"
    return None
