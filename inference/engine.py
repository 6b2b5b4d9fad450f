"""The engine: continues many prompts at once with a key/value cache, each prompt with random draws of its own.

Start reading at generate_tokens(). generate_stories(), at the end, does the same from text to text.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import UserError
from config.schema import SamplingConfig
from config.wording import show
from data.tokenizer import END_OF_STORY
from device import send
from inference.sampling import sample_next
from model import KVCache, Transformer

MAX_ROWS = 128  # prompts continued at once
CACHE_BYTES = 2**31  # fewer rows, if their keys and values would need more memory than this
CHECK_EVERY = 8  # tokens between checks of which rows have ended; on a GPU each check waits for the device
PREFILL_TOKENS = 4096  # prompt tokens in one pass, since their attention takes memory


class Continuation:
    """A prompt that is being continued: its tokens, its random generator, and the tokens generated so far."""

    def __init__(self, index: int, prompt: Sequence[int], seed: int, max_new_tokens: int) -> None:
        self.index, self.prompt, self.new = index, prompt, []
        self.context = list(prompt)  # the tokens that the model sees; the last one is not in the cache yet
        # its own generator, on the CPU: the draws depend neither on the device nor on the rest of the batch
        self.generator = torch.Generator().manual_seed(seed)
        self.log_probability = 0.0  # of the new tokens, nats, by the model's own distribution (temperature 1)
        self.max_new_tokens, self.done = max_new_tokens, False

    def extend(self, tokens: list[int], log_probabilities: list[float], end: int) -> None:
        """Append tokens up to and including `end`; later ones are discarded."""
        count = tokens.index(end) + 1 if end in tokens else len(tokens)
        self.new += tokens[:count]
        self.context += tokens[:count]
        self.log_probability += sum(log_probabilities[:count])
        self.done = self.new[-1] == end or len(self.new) == self.max_new_tokens


@torch.inference_mode()
def generate_tokens(model: Transformer, prompts: Sequence[Sequence[int]], seeds: Sequence[int], end: int,
                    num_tokens: int, sampling: SamplingConfig, check_every: int = CHECK_EVERY,
                    ) -> Iterator[list[Continuation]]:
    """Continue prompts[i] with seeds[i], many at once. Yields the running continuations every check_every tokens.

    A continuation is done after the token `end`, its last one, or after max_new_tokens; it is yielded once more then.
    When it outgrows the model's context, it continues from the last half of the context. Only ids below num_tokens, the
    tokenizer's size, are generated, since the model's vocabulary may be larger. The model must be in eval mode.
    """
    config, device = model.config, model.tok_embeddings.weight.device
    max_len = min(config.max_seq_len, max(map(len, prompts)) + sampling.max_new_tokens)
    row_bytes = 8 * config.n_layers * config.kv_heads * config.head_dim * max_len  # keys and values in float32
    batches = -(-len(prompts) // max(1, min(MAX_ROWS, CACHE_BYTES // row_bytes)))  # rounded up
    max_rows = -(-len(prompts) // batches)
    cache = KVCache(config, max_rows, max_len, device)
    for first in range(0, len(prompts), max_rows):
        running = [Continuation(i, prompts[i], seeds[i], sampling.max_new_tokens)
                   for i in range(first, min(first + max_rows, len(prompts)))]
        cache.lengths = [0] * len(running)
        prefill(model, cache, running, range(len(running)))
        seen = seen_tokens(running, end, num_tokens, device) if sampling.repetition_penalty != 1 else None
        while running:
            left = sampling.max_new_tokens - len(running[0].new)  # the same in all rows
            steps = min(check_every, left, max_len - cache.length)
            uniforms = torch.stack([torch.rand(steps, generator=row.generator) for row in running])  # (rows, steps)
            tokens = torch.tensor([row.context[-1:] for row in running])  # (rows, 1)
            new = decode_steps(model, cache, tokens, uniforms, num_tokens, sampling, seen)
            for row, *of_row in zip(running, *new, strict=True):
                row.extend(*of_row, end)
            yield running
            order = remove_done_rows(cache, running)
            running = [running[row] for row in order]
            seen = seen[send(torch.tensor(order, dtype=torch.int64), device)] if seen is not None else None
            full = [row for row, length in enumerate(cache.lengths) if length == config.max_seq_len]
            for row in full:
                running[row].context = running[row].context[-(config.max_seq_len // 2):]
            prefill(model, cache, [running[row] for row in full], full)


def seen_tokens(running: Sequence[Continuation], end: int, num_tokens: int, device: torch.device) -> Tensor:
    """The tokens of each prompt, bool, (rows, num_tokens), for repetition_penalty.

    Without `end`, which begins every prompt: the penalty would keep stories from ending.
    """
    seen = torch.zeros(len(running), num_tokens, dtype=torch.bool)
    for row, continuation in enumerate(running):
        seen[row, [token for token in continuation.prompt if token != end]] = True
    return send(seen, device)


def decode_steps(model: Transformer, cache: KVCache, tokens: Tensor, uniforms: Tensor, num_tokens: int,
                 sampling: SamplingConfig, seen: Tensor | None) -> tuple[list[list[int]], list[list[float]]]:
    """One new token in each row for each column of uniforms, (rows, steps), and their log-probabilities, temperature 1.

    tokens: int64, (rows, 1), the last token of each row so far. Synchronizes with the device once, at the end.
    """
    tokens, uniforms = (send(x, model.tok_embeddings.weight.device) for x in (tokens, uniforms))
    new, log_probabilities = [], []
    for column in uniforms.unbind(dim=1):
        logits = model(tokens, cache=cache)[:, -1, :num_tokens].float()  # (rows, num_tokens)
        tokens = sample_next(logits, column, sampling, seen)[:, None]  # (rows, 1)
        if seen is not None:
            seen.scatter_(1, tokens, True)
        new.append(tokens)
        log_probabilities.append(logits.gather(1, tokens) - logits.logsumexp(dim=-1, keepdim=True))
    return torch.cat(new, dim=1).tolist(), torch.cat(log_probabilities, dim=1).tolist()


def remove_done_rows(cache: KVCache, running: Sequence[Continuation]) -> list[int]:
    """Shrink the cache to the rows that are not done. Returns which row each of the remaining rows was before."""
    kept = sum(not row.done for row in running)
    last = [row for row in range(kept, len(running)) if not running[row].done]
    order = [last.pop() if running[row].done else row for row in range(kept)]  # rows from the end fill the gaps
    moved = [row for row in range(kept) if order[row] != row]
    copy_rows(cache, moved, cache, [order[row] for row in moved])
    del cache.lengths[kept:]
    return order


def copy_rows(cache: KVCache, rows: Sequence[int], source: KVCache, source_rows: Sequence[int]) -> None:
    """Copy source_rows of a cache to rows of another cache, or of the same one."""
    if not rows:
        return
    into, of = (send(torch.tensor(numbers), cache.device) for numbers in (rows, source_rows))  # a list would wait
    for own_layer, source_layer in zip(cache.layers, source.layers, strict=True):
        for own, other in zip(own_layer, source_layer, strict=True):
            own[into, :, :source.length] = other[of, :, :source.length]
    for row, source_row in zip(rows, source_rows, strict=True):
        cache.lengths[row] = source.lengths[source_row]


def prefill(model: Transformer, cache: KVCache, running: Sequence[Continuation], rows: Sequence[int]) -> None:
    """Fill these rows of the cache with all tokens of their contexts but the last.

    Contexts of one length are computed in one pass (or more, of PREFILL_TOKENS each), and equal ones only once. There
    is no padding, so a story's bits do not depend on which other prompts are continued with it.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for continuation, row in zip(running, rows, strict=True):
        cache.lengths[row] = 0
        rows_of.setdefault(tuple(continuation.context[:-1]), []).append(row)
    for length in sorted({len(context) for context in rows_of} - {0}):
        contexts = [context for context in rows_of if len(context) == length]
        size = max(1, PREFILL_TOKENS // length)
        for batch in (contexts[i:i + size] for i in range(0, len(contexts), size)):
            filled = KVCache(model.config, len(batch), length, cache.device)
            model.hidden_states(send(torch.tensor(batch), cache.device), filled)
            pairs = [(row, source) for source, context in enumerate(batch) for row in rows_of[context]]
            copy_rows(cache, [row for row, _ in pairs], filled, [source for _, source in pairs])


# From text to text

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
                     stops: Sequence[str] = ()) -> Iterator[Story]:
    """Generate a story for each prompt and its seed, in the order in which they are done. A prompt may be empty.

    watch: called with the running continuations every few tokens; with a single prompt, after each token.
    stops: texts that end a story where the first of them occurs after the prompt.
    Raises UserError if a prompt fills the model's context.
    """
    end, encoded = tokenizer.token_to_id(END_OF_STORY), encode_prompts(tokenizer, prompts, model.config.max_seq_len)
    check_every = 1 if stops or (watch is not None and len(prompts) == 1) else CHECK_EVERY
    reach = max((len(stop.encode("utf-8")) for stop in stops), default=0)  # a stop text has at most so many tokens
    for running in generate_tokens(model, encoded, seeds, end, tokenizer.get_vocab_size(), sampling, check_every):
        for row in running if stops else ():
            row.done |= find_stop(tokenizer.decode(row.new[-reach:]), stops) is not None
        if watch is not None:
            watch(running)
        for row in running:
            if row.done:
                new = tokenizer.decode(row.new, skip_special_tokens=True)
                stop = find_stop(new, stops)
                yield Story(row.index, tokenizer.decode(row.prompt, skip_special_tokens=True) + new[:stop], row.new,
                            row.log_probability / len(row.new), row.new[-1] == end or stop is not None)


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """The place of the first of the stop texts in a text, or None."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def generate_samples(model: Transformer, tokenizer: Tokenizer, sampling: SamplingConfig) -> list[str]:
    """One story for each prompt of the config, always with the same seed, so that evaluations can be compared."""
    was_training = model.training
    model.eval()
    try:
        seeds = [sampling.seed] * len(sampling.prompts)
        return [story.text for story in sorted(generate_stories(model, tokenizer, sampling.prompts, sampling, seeds))]
    finally:
        model.train(was_training)
