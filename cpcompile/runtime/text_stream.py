"""Token ids -> text, piece by piece: only whole characters, and nothing that might become a stop string.

A character may take several tokens, and some tokenizers write a token differently at the start of a text. So the text
of new tokens is what a few old ones and they decode to together, without what the old ones decode to alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

INCOMPLETE = "\ufffd"
"""What a decoder puts where bytes are no character, or not yet."""


class TextStream:
    """The text of ids that come one by one; `stopped` says whether one of the strings `stop` appeared."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """The text continues that of `prompt`; it ends before the first of `stop`."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(prompt[-CONTEXT:])
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The characters that `token` completes; possibly none."""
        self._ids.append(token)
        new = self._decode()
        return "" if new.endswith(INCOMPLETE) else self._emit(new)

    def finish(self) -> str:
        """What is left: incomplete characters, and what did not become a stop string."""
        rest, self._held = self._emit(self._decode()) + self._held, ""
        return rest

    def _decode(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        return str(self._tokenizer.decode(self._ids[self._start :])[len(before) :])

    def _emit(self, new: str) -> str:
        """`new` after what was held back, up to what may be the beginning of a stop string."""
        self._start, self._read = self._read, len(self._ids)
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(each) for each in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((len(each) for each in self._stop), default=1) - 1
        held = next((n for n in range(min(longest, len(text)), 0, -1) if self._may_stop(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _may_stop(self, end: str) -> bool:
        return any(each.startswith(end) for each in self._stop)


CONTEXT = 8
"""Tokens of the prompt that are decoded with the first new ones."""
