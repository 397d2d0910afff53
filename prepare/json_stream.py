"""
Read a JSON text that is too large for memory, value by value.
"""

import json
import re

CHUNK = 1 << 20  # characters to read at once
LONGEST = 1 << 26  # characters in one value


class JsonStream:
    """A position in a JSON text. Damage is a ValueError that names the character."""

    def __init__(self, file):
        self.file = file  # a text file
        self.text = ""  # the part in memory
        self.pos = 0  # in self.text
        self.offset = 0  # characters before self.text

    def peek(self):
        """Return the next character that is not white space, "" at the end."""
        while not (match := re.compile(r"\S").search(self.text, self.pos)):
            self.pos = len(self.text)
            if not self._read_more():  # only white space was left
                return ""
        self.pos = match.start()
        return match[0]

    def expect(self, *characters):
        """Move past the next character that is not white space, one of `characters`; return it."""
        # name the character read and the one expected
        character = self.peek()
        if character not in characters:
            problem = f"{character!r} instead of" if character else "it ends before"
            position = self.offset + self.pos
            raise ValueError(f"{problem} {' or '.join(characters)} at character {position:,}")
        self.pos += 1
        return character

    def value(self):
        """Return the next value."""
        self.peek()
        while True:
            try:
                # try to parse; read more and try again if the value is cut off
                value, end = json.JSONDecoder().raw_decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                # an error at the end of what is in memory may only mean that the rest is missing
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                message = f"{error.msg.removesuffix(' at')} at character"
                position = self.offset + error.pos
                if not cut or len(self.text) - self.pos > LONGEST or not self._read_more():
                    raise ValueError(f"{message} {position:,}") from None
            else:
                # a number that ends where the text in memory does may go on
                length = end - self.pos
                if end < len(self.text) or not self._read_more():
                    self.pos += length
                    return value

    def items(self, skip_broken=False, next_lists=()):
        """Yield the values of the list that begins here.

        skip_broken: instead of raising the error of a broken object, yield it and go on.
        next_lists: names of the lists that may follow; skipping stops before them.
        """
        self.expect("[")  # the list's start
        if self.peek() == "]":  # an empty list
            self.pos += 1
            return
        while True:
            try:
                value = self.value()
            except (ValueError, RecursionError) as error:
                if not (skip_broken and self._skip_object(next_lists)):
                    raise
                value = error  # the caller tells it from a value by its type
            yield value
            if self.expect(",", "]") == "]":
                return

    def _skip_object(self, next_lists):
        """Move to the end of the object that begins here. Return False if the text ends first."""
        # the next object or list begins after it; quotes within a string would be escaped
        object_end = r'\}\s*(?=,\s*\{\s*"|\]\s*,\s*")'
        list_end = rf'(?=\]\s*,\s*"(?:{"|".join(next_lists)})"\s*:)'
        pattern = re.compile(f"{object_end}|{list_end}")
        while not (match := pattern.search(self.text, self.pos)):
            self.pos = max(self.pos, len(self.text) - 1000)  # the match may not be whole yet
            if not self._read_more():
                return False
        self.pos = match.end()
        return True

    def _read_more(self):
        """Forget the text before `pos`, read a chunk. Return False at the end of the file."""
        chunk = self.file.read(CHUNK)
        self.offset += self.pos  # keeps positions in error messages right
        self.text = self.text[self.pos :] + chunk
        self.pos = 0
        return bool(chunk)
