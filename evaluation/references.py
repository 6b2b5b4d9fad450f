"""References: real stories with the same beginnings, which generated stories are compared with.

The texts are decoded from token files. In a long file, the stories are spread evenly over it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise, zip_longest
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.token_files import TokenFile
from data.tokenizer import END_OF_STORY

NUM_PROMPTS = 10  # different prompts of a comparison
BEGINNING = 5  # words of a prompt that is taken from the validation stories


class Passage(NamedTuple):
    """A story without its prompt, which is not measured. ended: the story was not cut off."""

    prompt: str
    text: str
    ended: bool


def read_stories(file: TokenFile, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """The texts of `count` stories of a token file, evenly spread over it; all of them if it has no more."""
    separator, tokens = tokenizer.token_to_id(END_OF_STORY), file.tokens
    if file.counts["stories"] <= count:
        ends = np.flatnonzero(tokens == separator)
        pieces = (tokens[start + 1:end] for start, end in pairwise(ends))
    else:
        pieces = (_story_after(tokens, int(place), separator) for place in np.linspace(0, len(tokens), count + 1)[:-1])
    while chunk := list(islice((piece.tolist() for piece in pieces if len(piece)), 1000)):
        yield from tokenizer.decode_batch(chunk)


def _story_after(tokens: np.ndarray, place: int, separator: int) -> np.ndarray:
    """The first whole story after a place; an empty array if there is none."""
    reach = 4096  # tokens to look at
    while True:
        ends = np.flatnonzero(tokens[place:place + reach] == separator)
        if len(ends) > 1:
            return tokens[place + ends[0] + 1:place + ends[1]]
        if place + reach >= len(tokens):
            return tokens[:0]
        reach *= 2


def choose_references(stories: Sequence[str], prompts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """At most `count` pairs of a prompt and a story that begins with it.

    The prompts are those of `prompts` that a story begins with, then, up to NUM_PROMPTS, the most common first
    BEGINNING words of the stories. Each is used equally often, as long as there are stories for it.
    """
    common = Counter(" ".join(words) for story in stories if len(words := story.split(" ")[:BEGINNING]) == BEGINNING)
    chosen = [prompt for prompt in prompts if any(story.startswith(prompt) for story in stories)]
    for beginning, _ in common.most_common():
        beginning = beginning.rstrip(",.;:!?")
        if len(chosen) < NUM_PROMPTS and "\n" not in beginning and not any(
                prompt.startswith(beginning) or beginning.startswith(prompt) for prompt in chosen):
            chosen.append(beginning)
    by_prompt = {prompt: [] for prompt in chosen}
    for story in stories:
        prompt = next((prompt for prompt in chosen if story.startswith(prompt) and len(story) > len(prompt)), None)
        if prompt is not None:
            by_prompt[prompt].append(story)
    rounds = zip_longest(*by_prompt.values())  # a story for each prompt, None where there is none left
    pairs = [(prompt, story) for of_round in rounds for prompt, story in zip(by_prompt, of_round, strict=True) if story]
    return pairs[:count]


def cut_reference(prompt: str, story: str, tokenizer: Tokenizer, limit: int) -> Passage:
    """The story without its prompt, cut off after `limit` tokens, as the model's stories are."""
    ids = tokenizer.encode(story[len(prompt):], add_special_tokens=False).ids
    return Passage(prompt, tokenizer.decode(ids[:limit]), len(ids) < limit)  # a model must also have room for the end
