"""From text to text: stories for prompts, and the sample stories of a run."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from config import UserError
from config.schema import SamplingConfig
from config.wording import show
from data.tokenizer import END_OF_STORY
from inference.engine import Continuation, Engine, generate_tokens
from inference.packed_weights import pack, refresh
from model import Transformer


class Story(NamedTuple):
    """A generated story.

    index: of its prompt and seed among those given. text: prompt and continuation. tokens: the new ones, ids.
    log_probability: their mean, nats, by the model's own distribution (temperature 1). ended: by END_OF_STORY or by a
    stop text, which the text does not include.
    """

    index: int
    text: str
    tokens: list[int]
    log_probability: float
    ended: bool


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], context: int) -> list[list[int]]:
    """The token ids of each prompt, after a separator, as in training. Raises UserError if one fills the context."""
    end = tokenizer.token_to_id(END_OF_STORY)
    encoded = [[end, *encoding.ids] for encoding in tokenizer.encode_batch(list(prompts), add_special_tokens=False)]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) >= context:
            raise UserError(f"the prompt {show(prompt[:30] + '...')} has {len(ids) - 1:,} tokens, but the model's "
                            f"context holds {context:,} with the story: shorten it to {context - 2:,}")
    return encoded


def generate_stories(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig,
                     seeds: Sequence[int], watch: Callable[[list[Continuation]], None] | None = None,
                     stops: Sequence[str] = (), engine: Engine | None = None) -> Iterator[Story]:
    """Generate a story for each prompt and its seed, in the order in which they are done. A prompt may be empty.

    watch: called with the running continuations every few tokens; with a single prompt on a CPU, every second token.
    stops: texts that end a story where the first of them occurs after the prompt.
    Raises UserError if a prompt fills the model's context.
    """
    end, encoded = tokenizer.token_to_id(END_OF_STORY), encode_prompts(tokenizer, prompts, model.config.max_seq_len)
    growing = watch is not None and len(prompts) == 1 and model.tok_embeddings.weight.device.type == "cpu"
    # a GPU generates many tokens per screen frame; on a CPU, checking after each token costs a tenth of the speed
    check_every = 1 if stops else 2 if growing else None
    reach = max((len(stop.encode("utf-8")) for stop in stops), default=0)  # a stop text has at most so many tokens
    for running in generate_tokens(model, encoded, seeds, end, tokenizer.get_vocab_size(), sampling, check_every,
                                   engine):
        for row in running if stops else ():
            row.done |= find_stop(tokenizer.decode(row.new[-reach:]), stops) is not None
        if watch is not None:
            watch(running)
        for row in running:
            if row.done:
                new = tokenizer.decode(row.new, skip_special_tokens=True)
                stop = find_stop(new, stops)
                yield Story(row.index, tokenizer.decode(row.prompt, skip_special_tokens=True) + new[:stop], row.new,
                            sum(row.log_probabilities) / len(row.new), row.new[-1] == end or stop is not None)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """The place of the first of the stop texts in a text, or None."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def sample_stories(model: Transformer, tokenizer: Tokenizer, sampling: SamplingConfig, compute: str,
                   ) -> Callable[[SamplingConfig], list[str]]:
    """A function that generates a story for each prompt of its argument with the weights that the model then has.

    The seed is always the same, so that evaluations can be compared. The function keeps its engine, and on a GPU the
    graphs of its steps. sampling: its argument, or one with more. compute: see pack().
    """
    longest = max(map(len, encode_prompts(tokenizer, sampling.prompts, model.config.max_seq_len)))
    engine = Engine(pack(model, compute), tokenizer.token_to_id(END_OF_STORY), tokenizer.get_vocab_size(),
                    len(sampling.prompts), longest + sampling.max_new_tokens)

    def generate(sampling: SamplingConfig) -> list[str]:
        refresh(engine.model, model)
        seeds = [sampling.seed] * len(sampling.prompts)
        stories = generate_stories(engine.model, tokenizer, sampling.prompts, sampling, seeds, engine=engine)
        return [story.text for story in sorted(stories)]

    return generate
