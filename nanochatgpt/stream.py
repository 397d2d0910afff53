"""Text from token ids as they arrive, in whole characters, up to a stop string."""

import codecs


class Trim:
    """Strips the white space around a text that arrives piece by piece."""

    def __init__(self, started=False):
        self.started = started  # whether text other than white space has come
        self.held = ""  # white space to print only if more text follows

    def push(self, text):
        """Take the next piece; return the text to print now."""
        text = self.held + text
        if not self.started:
            text = text.lstrip()  # nothing was printed yet
        ready = text.rstrip()
        self.held = text[len(ready) :]
        self.started = self.started or ready != ""
        return ready


class TextStream:
    """Turns ids into text as they arrive, up to the first stop string. Holds back half characters
    and text that may begin a stop string."""

    def __init__(self, tokenizer, stop_strings=()):
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.length = 0  # characters of text so far
        self.stopped_at = None  # index in the text where the first stop string begins
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half characters
        self._held = ""  # the end of the text, if it may begin a stop string

    @property
    def within_character(self):
        """Whether the last id ends within a character."""
        return bool(self._decoder.getstate()[0])

    def push(self, token):
        """Take the next id; return the text that is certain now."""
        text = self._decoder.decode(self.tokenizer.token_bytes(token))
        self.length += len(text)
        self._held += text

        # the text ends where the first stop string begins
        stops = [self._held.find(stop) for stop in self.stop_strings if stop in self._held]
        if stops:
            self.stopped_at = self.length - len(self._held) + min(stops)  # _held ends at `length`
            ready = self._held[: min(stops)]
            self._held = ""
            return ready

        # hold back the beginning of a stop string
        n_held = max((overlap(self._held, stop) for stop in self.stop_strings), default=0)
        ready = self._held[: len(self._held) - n_held]
        self._held = self._held[len(ready) :]
        return ready

    def rest(self):
        """Return the text held back when no more ids follow, without half a character."""
        text = self._held
        self._held = ""
        return text


def overlap(text, stop):
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):  # longest first
        if text.endswith(stop[:n]):
            return n
    return 0
