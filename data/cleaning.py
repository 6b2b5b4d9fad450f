"""Cleaning of story texts: white space, encoding repair, and which texts are left out.

Healthy text of any language stays as it is, byte for byte: only a repair that makes the text sound, lone surrogates and
many U+FFFD are evidence of damage, not the mere suspicion that ftfy has of a text.
"""

import re
from collections import Counter

from config import UserError

CLEANING_VERSION = 2  # raise it when cleaning changes: token files built before are then rebuilt
SHORT = 100  # characters; a shorter text without an end mark was cut off
# what a text may end in: the end marks of all scripts, and closing quotes and brackets
END_MARKS = ".!?…。．！？｡।॥؟۔։።။៕᙮‼⁇⁈⁉" "\"'”’“‘»«›‹)）]］}｝」』】》〉〕〗〞＂"
MAX_LOST = 1 / 1000  # share of U+FFFD, each a lost character, up to which a text is kept
# the closing marks of each opening one; Swedish and Finnish open a quotation with the closing mark
QUOTES = {"“": "”", "”": "”", "„": "“”", "‘": "’", "‚": "‘’", "’": "’", "«": "»", "»": "«»", "‹": "›", "›": "‹›"}
# an opening mark at the start of a word; `‚Äú` and the like are damaged marks themselves
OPENING = re.compile(rf"(?<!\S)[(\[{{—–-]?([{''.join(QUOTES)}])(?<!‚(?=Ä[úùôòîì¶¢]))(?=\S)")


class Counts(Counter):
    """Counts of texts by what became of them, with the first text of each kind as an example."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def note(self, kind: str, text: str = "") -> None:
        self[kind] += 1
        if text:
            self.examples.setdefault(kind, text[:60])


def clean(text: str, counts: Counts, short_is_cut_off: bool = True) -> str:
    """The story without outer white space and with its encoding repaired; "" if it is left out. Counts the reason.

    short_is_cut_off: leave out texts of fewer than SHORT characters without an end mark.
    """
    text = text.strip()
    if not text:
        counts.note("empty")
    elif not text.isascii() and not (text := _repair(text, counts)):
        return ""
    elif short_is_cut_off and is_cut_off(text):
        counts.note("cut_off", text)
        return ""
    return text


def is_cut_off(text: str) -> bool:
    return len(text) < SHORT and text[-1] not in END_MARKS


def _repair(text: str, counts: Counts) -> str:
    """The text with mojibake such as `â€œ` repaired; "" if characters are lost, which is counted."""
    try:
        text.encode("utf-8")
        lost = text.count("\ufffd") > MAX_LOST * len(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        lost = True
    if lost:
        counts.note("unreadable", text.encode("utf-8", "replace").decode("utf-8"))
        return ""
    from ftfy.badness import is_bad  # imported here, so that generate.py starts a tenth of a second sooner

    if is_bad(text) and (repaired := _fix_encoding(text)) != text:
        counts.note("repaired", text)
        text = repaired
    return text


def _fix_encoding(text: str) -> str:
    """The text with the mojibake that some decoding repairs. The marks of a sound quotation are no mojibake."""
    from ftfy import fix_encoding

    parts, start = [], 0
    for mark in [*_quotation_marks(text), len(text)]:
        # `â€` alone was a closing quote whose third byte, undefined in cp1252, got lost; ftfy would make it a dagger
        parts.append(fix_encoding(re.sub("â€(?=[\x00-\x7fâ]|$)", "”", text[start:mark])))
        parts.append(text[mark:mark + 1])
        start = mark + 1
    return "".join(parts).strip()


def _quotation_marks(text: str) -> list[int]:
    """The places of opening marks at the start of a word, and of their closing marks in the same paragraph.

    With the letter beside it, such a mark may look like a damaged letter: `Ã”` in “MAÇÃ” is also what a damaged Ô is.
    """
    places, start = [], 0
    while opening := OPENING.search(text, start):
        start = opening.end()
        places.append(start - 1)
        end = text.find("\n", start)
        closing = re.compile(rf"(?<!\s)(?<!â€)[{QUOTES[opening[1]]}](?!\w)").search(
            text, start, end if end >= 0 else len(text))
        if closing:
            places.append(closing.start())
            start = closing.end()
    return places


def keep_as_is(text: str, counts: Counts, name: str) -> str:
    """The text; "" if it is empty, which is counted. Raises UserError if UTF-8 cannot encode the text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        number = 1 + sum(counts[key] for key in ("stories", "empty", "held_out", "duplicate", "in_validation"))
        raise UserError(f"{name}: story {number} holds half of a character (\\u{ord(text[error.start]):x}); "
                        "data.clean: true leaves such stories out") from None
    if text.strip():
        return text
    counts.note("empty")
    return ""
