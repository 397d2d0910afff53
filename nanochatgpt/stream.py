"""
Text from token ids as they arrive: whole characters, stop strings, white space.
"""

import codecs


class Trim:
    """Takes a text piece by piece, and gives it without white space around it."""

    def __init__(self):
        self.begun, self.held = False, ""

    def push(self, text):
        """Take more text; return what of it is shown by now: white space, only when something follows."""
        self.held += text
        if not self.begun:
            self.held = self.held.lstrip()
        shown = self.held.rstrip()
        self.begun, self.held = self.begun or bool(shown), self.held[len(shown) :]
        return shown


class TextStream:
    """Turns ids into text as they come; holds back half characters, and what may be the beginning of a stop string.

    length: characters of text so far; stopped_at: where in it a stop string begins, None while there is none.
    """

    def __init__(self, tokenizer, stop_strings=()):
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.length, self.stopped_at = 0, None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    @property
    def within_character(self):
        """Whether the ids so far end within a character."""
        return bool(self._decoder.getstate()[0])

    def push(self, token):
        """Take one more id; return the text that is certain now and was not returned before."""
        text = self._decoder.decode(self.tokenizer.token_bytes(token))
        self.length += len(text)
        self._held += text
        found = [at for stop in self.stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped_at = self.length - len(self._held) + min(found)
            certain, self._held = min(found), self._held[: min(found)]
        else:
            certain = len(self._held) - max(
                (overlap(self._held, stop) for stop in self.stop_strings), default=0
            )
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def rest(self):
        """Return what was held back and turned out to be no stop; half a character at the end is dropped."""
        text, self._held = self._held, ""
        return text


def overlap(text, stop):
    """Return the length of the longest beginning of `stop`, short of the whole, that `text` ends in."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
