"""Cleaning of story texts: white space, encoding repair, and which texts are left out."""

import re
from collections import Counter

from config import UserError

CLEANING_VERSION = 1  # raise it when cleaning changes: token files built before are then rebuilt
SHORT, CLOSING = 100, ".!?…\"'”’»)"  # a text of fewer characters that ends in none of these was cut off


def clean(text: str, counts: Counter[str]) -> str:
    """The story without outer white space and with its encoding repaired; "" if it is left out. Counts the reason."""
    text = text.strip()
    if not text:
        counts["empty"] += 1
    elif not text.isascii() and not (text := _repair(text, counts)):
        counts["unrepairable"] += 1
    elif len(text) < SHORT and text[-1] not in CLOSING:
        counts["stubs"] += 1
        return ""
    return text


def _repair(text: str, counts: Counter[str]) -> str:
    """The text with mojibake such as `â€œ` repaired; "" if that fails or characters are lost."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return ""
    from ftfy import fix_encoding  # imported here, so that generate.py starts a tenth of a second sooner
    from ftfy.badness import is_bad

    if damaged := is_bad(text):
        # `â€` alone was a closing quote whose third byte, undefined in cp1252, got lost; ftfy would make it a dagger
        text = fix_encoding(re.sub("â€(?=[\x00-\x7fâ]|$)", "”", text)).strip()
    if "\ufffd" in text or (damaged and is_bad(text)):
        return ""
    counts["repaired"] += damaged
    return text


def keep_as_is(text: str, counts: Counter[str], name: str) -> str:
    """The text; "" if it is empty, which is counted. Raises UserError if UTF-8 cannot encode the text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        number = counts["stories"] + counts["empty"] + counts["held_out"] + 1
        raise UserError(f"{name}: story {number} holds half of a character (\\u{ord(text[error.start]):x}); "
                        "data.clean: true leaves such stories out") from None
    if text.strip():
        return text
    counts["empty"] += 1
    return ""
