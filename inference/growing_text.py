"""The text of a story while its tokens arrive: whole characters, and no part of a stop text."""

import codecs
from collections.abc import Sequence

from inference.generation import find_stop


class GrowingText:
    """Turns tokens into text as soon as it is certain.

    token_bytes: of each token id (data/tokenizer.py). stops: texts that end the story; `stopped` is True once one of
    them has occurred. prompt: the tokens before, since they may end inside a character.
    """

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.token_bytes, self.stops, self.stopped, self.waiting = token_bytes, stops, False, ""
        self.beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decode(prompt)

    def _decode(self, tokens: Sequence[int], last: bool = False) -> str:
        return self.decoder.decode(b"".join(self.token_bytes[token] for token in tokens), last)

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that is certain with these tokens; with the last ones, all the rest."""
        self.waiting += self._decode(tokens, last)
        place = find_stop(self.waiting, self.stops) if self.stops else None
        if place is None:
            held = 0 if last else max((len(text) for text in self.beginnings if self.waiting.endswith(text)), default=0)
            place = len(self.waiting) - held
            text, self.waiting = self.waiting[:place], self.waiting[place:]
        else:
            text, self.waiting, self.stopped = self.waiting[:place], "", True
        return text

    def peek(self, token: int) -> str:
        """The text that this token would add, stop texts aside."""
        begun = self.decoder.getstate()[0]  # the bytes of a character that is not complete yet
        return codecs.utf_8_decode(begun + self.token_bytes[token], "replace")[0]
