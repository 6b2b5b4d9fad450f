"""What a model of articles.py is held against: validation stories, and where the articles of its own stories stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from config import Config, UserError
from config.schema import SamplingConfig
from data.likelihood import measure_likelihood
from data.measures import ARTICLES, Learned, learn, split_words
from data.tokens import END_OF_STORY, TokenFile, prepare_tokens
from data.yardstick import Passage, choose_references, compare, cut_reference, measure_passages, read_stories
from evaluate import CHOOSE_FROM, LEARN_FROM
from generate import generate_tokens
from model import Transformer
from train_custom_tokenizer import ensure_tokenizer

AT_THE_END = 5  # times as many validation stories are scored there as at the points before
STORIES = 64  # told at the end; a quarter of them at the points before
SCORES = ("val_loss", "bits_per_byte", "article_loss", "article_accuracy", "next_loss", "after_next_loss",
          "present_loss")


class Text(NamedTuple):
    """The stories as the tokens of one vocabulary."""

    tokenizer: Tokenizer
    train_file: TokenFile
    validation: TokenFile


class Yardstick(NamedTuple):
    pairs: list[tuple[str, str]]  # a beginning, and a validation story that begins so
    learned: Learned
    follows: frozenset[str]  # the words that follow an article in the training stories


def prepare(config: Config) -> Text:
    tokenizer = ensure_tokenizer(config)
    return Text(tokenizer, *(prepare_tokens(config.data, tokenizer, split) for split in ("train", "validation")))


def words_after_articles(texts: Iterable[str], share: float = 0.01) -> frozenset[str]:
    """Words that in `share` of their places or more come right after an article. A mark or a verb is none of them."""
    after, seen = Counter(), Counter()
    for text in texts:
        tokens = [token.lower() for token in split_words(text)]
        seen.update(tokens)
        after.update(word for article, word in pairwise(tokens) if article in ARTICLES)
    return frozenset(word for word, count in after.items() if count >= share * seen[word])


def misplaced_articles(text: str, follows: frozenset[str]) -> tuple[int, int]:
    """How many articles stand where none can ("a was", "the the", "a."), and how many articles there are."""
    tokens = [token.lower() for token in split_words(text)]
    after = [word for article, word in pairwise(tokens) if article in ARTICLES]
    return sum(word not in follows for word in after), len(after)


def make_yardstick(text: Text, sampling: SamplingConfig) -> Yardstick:
    """Beginnings with their real stories, and what the training stories teach. Raises UserError if there is none."""
    pairs = choose_references(list(read_stories(text.validation, text.tokenizer, CHOOSE_FROM)), sampling.prompts,
                              STORIES)
    if not pairs:
        raise UserError(f"{text.validation.path}: no story in it is long enough to hold told ones against")
    training = list(read_stories(text.train_file, text.tokenizer, LEARN_FROM))
    return Yardstick(pairs, learn(training), words_after_articles(training))


def look(model: Transformer, text: Text, config: Config, yardstick: Yardstick, precision: Callable[[], Any],
         separators: bool, last: bool) -> tuple[dict[str, Any], list[Passage]]:
    """Score validation stories by the right next token, tell stories, and measure them beside real ones.

    Returns SCORES, each measure of data/yardstick.py's table, "misplaced" (%), and as "reference" the same measures of
    the real stories; and the told stories. separators: whether the model knows them. last: at the end of the run.
    """
    tokenizer, sampling, end = text.tokenizer, config.sampling, text.tokenizer.token_to_id(END_OF_STORY)
    tokens = text.validation.tokens
    ends = np.flatnonzero(tokens == end)
    count = config.training.eval_samples * (AT_THE_END if last else 1) or len(ends)
    tokens = tokens[:ends[min(count, len(ends) - 1)] + 1]  # the same stories whatever the vocabulary
    found = measure_likelihood(model, tokens if separators else tokens[tokens != end], tokenizer,
                               config.model.max_seq_len, 4 * config.training.batch_size,
                               model.tok_embeddings.weight.device, precision, False)
    pairs = yardstick.pairs if last else yardstick.pairs[:max(1, len(yardstick.pairs) // 4)]
    passages = tell(model, tokenizer, [prompt for prompt, _ in pairs], sampling, separators)
    references = [cut_reference(*pair, tokenizer, sampling.max_new_tokens) for pair in pairs]
    measured, real = (measure_passages(side, yardstick.learned, tokenizer, text.train_file.tokens, False)
                      for side in (passages, references))
    table = compare(passages, references, measured, real)
    figures, expected = ({**{row["key"]: row[side] for row in table}, "misplaced": share_misplaced(of, yardstick)}
                         for side, of in (("model", passages), ("reference", references)))
    return {**{key: found[key] for key in SCORES}, **figures, "reference": expected}, passages


def share_misplaced(passages: Sequence[Passage], yardstick: Yardstick) -> float | None:
    """Of all their articles, %. None if there is none."""
    pairs = [misplaced_articles(passage.text, yardstick.follows) for passage in passages]
    wrong, count = (sum(side) for side in zip(*pairs, strict=True))
    return 100 * wrong / count if count else None


def tell(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig, separators: bool,
         ) -> list[Passage]:
    """A story from each prompt, each with its own seed. A model that knows no separator does not begin with one."""
    end, passages = tokenizer.token_to_id(END_OF_STORY), [None] * len(prompts)
    beginnings = [[end, *encoding.ids] if separators else encoding.ids
                  for encoding in tokenizer.encode_batch(list(prompts), add_special_tokens=False)]
    seeds = range(sampling.seed, sampling.seed + len(prompts))
    for running in generate_tokens(model, beginnings, seeds, end, tokenizer.get_vocab_size(), sampling):
        for told in running:
            if told.done:
                text = tokenizer.decode(told.new, skip_special_tokens=True)
                passages[told.index] = Passage(prompts[told.index], text, told.new[-1] == end)
    return passages
