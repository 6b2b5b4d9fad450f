"""The engine: continues many prompts at once with a key/value cache, each prompt with random draws of its own.

Start reading at Engine.advance(). inference/generation.py does the same from text to text.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from config.schema import SamplingConfig
from device import send
from inference.captured_steps import CapturedSteps
from inference.sampling import NEUTRAL, sample_next, settings_in_use, settings_tensor
from model import KVCache, Transformer

MAX_ROWS = {"cuda": 2048, "mps": 128, "cpu": 128}  # prompts continued at once
CACHE_BYTES = 2**31  # fewer rows, if their keys and values would need more memory; on a GPU, half of what is free
CHECK_EVERY = {"cuda": 16, "mps": 8, "cpu": 8}  # tokens between checks of which rows have ended; a check synchronizes
COMPILE_PAYS = 50_000  # steps; compiling takes some 20 s, and saves less than a millisecond of a step
PREFILL_TOKENS = 4096  # prompt tokens in one pass, since their attention takes memory


class Continuation:
    """A prompt that is being continued: its tokens, its random generator, and the tokens generated so far.

    new: the generated tokens; log_probabilities: of each, nats, by the model's own distribution (temperature 1);
    alternatives: of each, the most likely tokens and their log-probabilities, if the engine was made with them.
    done: set by the engine; a caller may set it to drop the row.
    """

    def __init__(self, index: int, prompt: Sequence[int], seed: int, sampling: SamplingConfig) -> None:
        self.index, self.prompt, self.sampling, self.new = index, prompt, sampling, []
        self.context = list(prompt)  # the tokens that the model sees; the last one is not in the cache yet
        # its own generator, on the CPU: the draws depend neither on the device nor on the rest of the batch
        self.generator = torch.Generator().manual_seed(seed)
        self.log_probabilities, self.alternatives, self.done = [], [], False

    @property
    def left(self) -> int:
        """How many more tokens may be generated."""
        return self.sampling.max_new_tokens - len(self.new)

    def extend(self, tokens: list[int], log_probabilities: list[float], end: int,
               alternatives: Sequence[list[tuple[int, float]]] = ()) -> None:
        """Append tokens up to and including `end` or max_new_tokens; later ones are discarded."""
        count = min(tokens.index(end) + 1 if end in tokens else len(tokens), self.left)
        self.new += tokens[:count]
        self.context += tokens[:count]
        self.log_probabilities += log_probabilities[:count]
        self.alternatives += alternatives[:count]
        self.done = self.done or self.new[-1] == end or not self.left


class Batch(NamedTuple):
    """The tensors of a decode step, with a row for each continuation. The step reads and writes them in place, so that
    a CUDA graph can replay it."""

    tokens: Tensor  # int64, (rows, 1): the last token of each row, which is not in the cache yet
    lengths: Tensor  # int64, (rows,): tokens in the cache; only CapturedSteps reads them
    uniforms: Tensor  # float32, (rows, check_every): a draw for each new token
    step: Tensor  # int64, (1,): how many of these are used
    new: Tensor  # int64, (rows, check_every): the new tokens
    log_probabilities: Tensor  # float32, (rows, check_every)
    likely: Tensor  # int64, (rows, check_every, alternatives): the most likely tokens
    likely_log: Tensor  # float32, (rows, check_every, alternatives): their log-probabilities
    seen: Tensor  # bool, (rows, num_tokens): what repetition_penalty acts on
    settings: Tensor  # float32, (rows, 5): see settings_tensor()

    def first(self, rows: int) -> "Batch":
        return Batch(*(tensor[:rows] for tensor in self))


def make_batch(rows: int, steps: int, num_tokens: int, alternatives: int, device: torch.device) -> Batch:
    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    real = torch.float32
    return Batch(zeros(rows, 1), zeros(rows), zeros(rows, steps, dtype=real), zeros(1), zeros(rows, steps),
                 zeros(rows, steps, dtype=real), zeros(rows, steps, alternatives),
                 zeros(rows, steps, alternatives, dtype=real), zeros(rows, num_tokens, dtype=torch.bool),
                 zeros(rows, len(NEUTRAL), dtype=real) + 1)


def decode_step(model: Transformer, cache: KVCache, batch: Batch, used: frozenset[str]) -> None:
    """Append one token to each row of the batch: from embedding to drawn token. used: see settings_in_use()."""
    logits = model(batch.tokens, cache=cache)[:, -1, :batch.seen.shape[1]].float()  # (rows, num_tokens)
    uniforms = batch.uniforms.index_select(1, batch.step)[:, 0]  # (rows,)
    tokens = sample_next(logits, uniforms, batch.settings, used, batch.seen)[:, None]  # (rows, 1)
    log_probabilities = logits.log_softmax(dim=-1)  # (rows, num_tokens)
    if "repetition_penalty" in used:
        batch.seen.scatter_(1, tokens, True)
    if batch.likely.shape[2]:
        likely_log, likely = log_probabilities.topk(batch.likely.shape[2])  # (rows, alternatives)
        batch.likely.index_copy_(1, batch.step, likely[:, None])
        batch.likely_log.index_copy_(1, batch.step, likely_log[:, None])
    batch.tokens.copy_(tokens)
    batch.new.index_copy_(1, batch.step, tokens)
    batch.log_probabilities.index_copy_(1, batch.step, log_probabilities.gather(1, tokens))
    batch.step.add_(1)


class Engine:
    """Continues prompts, many at once; those beyond max_rows wait until a row is free.

    model: in eval mode. end: the token that ends a continuation, its last one. num_tokens: the tokenizer's size; only
    ids below it are generated, since the model's vocabulary may be larger. max_len: the most tokens of a prompt and its
    continuation (default: the model's context); a row that outgrows the model's context continues from the last half of
    the context. check_every: tokens between checks of which rows have ended. alternatives: how many of the most likely
    tokens to record. compiled: compile the step, where that works; it pays for tens of thousands of steps.
    """

    def __init__(self, model: Transformer, end: int, num_tokens: int, max_rows: int | None = None,
                 max_len: int | None = None, check_every: int | None = None, alternatives: int = 0,
                 compiled: bool = False) -> None:
        config, device = model.config, model.tok_embeddings.weight.device
        self.model, self.end, self.device = model, end, device
        self.check_every = check_every or CHECK_EVERY[device.type]
        self.max_len = min(config.max_seq_len, (max_len or config.max_seq_len) + self.check_every)
        dtype = getattr(model.output, "dtype", torch.float32) if device.type == "cuda" else torch.float32
        row_bytes = 2 * dtype.itemsize * config.n_layers * config.kv_heads * config.head_dim * self.max_len
        room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CACHE_BYTES
        self.max_rows = max(1, min(max_rows or MAX_ROWS[device.type], MAX_ROWS[device.type], room // row_bytes))
        self.cache = KVCache(config, self.max_rows, -(-self.max_len // 64) * 64, device, dtype)  # kernels like 64s
        self.cache.lengths = []
        self.batch = make_batch(self.max_rows, self.check_every, num_tokens, alternatives, device)
        self.rows: list[Continuation] = []  # running; row i of cache and batch
        self.waiting: deque[Continuation] = deque()
        self.used: frozenset[str] = frozenset()
        self.captured = (CapturedSteps(decode_step, model, self.cache, self.batch, compiled)
                         if device.type == "cuda" else None)

    def add(self, continuation: Continuation) -> None:
        """Let a prompt be continued as soon as a row is free."""
        self.waiting.append(continuation)

    @torch.inference_mode()
    def advance(self) -> list[Continuation]:
        """Generate the next tokens of all rows, check_every of them if so many are left.

        Returns the rows that ran; a row that is done is returned one last time. Empty if there is nothing to do.
        """
        self._update_rows()
        if not self.rows:
            return []
        steps = min(self.check_every, max(row.left for row in self.rows), self.max_len - self.cache.length)
        batch = self.batch.first(len(self.rows))
        upload(batch.tokens, torch.tensor([row.context[-1:] for row in self.rows]))  # (rows, 1)
        uniforms = torch.stack([torch.rand(steps, generator=row.generator) for row in self.rows])  # (rows, steps)
        upload(batch.uniforms[:, :steps], uniforms)
        batch.step.zero_()
        if self.captured is None:
            for _ in range(steps):
                decode_step(self.model, self.cache, batch, self.used)
        else:
            self.captured.run(steps, self.used)
        made = [tensor[:, :steps].tolist() for tensor in (batch.new, batch.log_probabilities)]
        if batch.likely.shape[2]:
            tokens, logs = batch.likely[:, :steps].tolist(), batch.likely_log[:, :steps].tolist()
            made.append([[list(zip(*pair, strict=True)) for pair in zip(*row, strict=True)]
                         for row in zip(tokens, logs, strict=True)])
        for row, tokens, logs, *likely in zip(self.rows, *made, strict=True):
            row.extend(tokens, logs, self.end, *likely)
        return self.rows

    def _update_rows(self) -> None:
        """Drop the rows that are done, restart those that are full from their last half, and take waiting ones in."""
        order = remove_done_rows(self.cache, self.rows, self.batch.seen)
        changed, self.rows = len(order) < len(self.rows), [self.rows[row] for row in order]
        full = [row for row, length in enumerate(self.cache.lengths) if length == self.max_len]
        for row in full:
            self.rows[row].context = self.rows[row].context[-(self.model.config.max_seq_len // 2):]
        first = len(self.rows)
        while self.waiting and len(self.rows) < self.max_rows:
            row = self.waiting.popleft()
            self.rows += [] if row.done else [row]
        new = range(first, len(self.rows))
        self.cache.lengths += [0 for _ in new]
        prefill(self.model, self.cache, [self.rows[row] for row in (*full, *new)], (*full, *new))
        if self.rows and (changed or new):
            samplings = [row.sampling for row in self.rows]
            self.used = settings_in_use(samplings)
            upload(self.batch.settings[:len(self.rows)], settings_tensor(samplings))
        if new and "repetition_penalty" in self.used:
            upload(self.batch.seen[first:len(self.rows)],
                   seen_tokens(self.rows[first:], self.end, self.batch.seen.shape[1]))


def upload(target: Tensor, source: Tensor) -> None:
    """Copy a tensor of the CPU into one on the device, without waiting for the device."""
    target.copy_(send(source, target.device))


@torch.inference_mode()
def generate_tokens(model: Transformer, prompts: Sequence[Sequence[int]], seeds: Sequence[int], end: int,
                    num_tokens: int, sampling: SamplingConfig, check_every: int | None = None,
                    engine: Engine | None = None) -> Iterator[list[Continuation]]:
    """Continue prompts[i] with seeds[i], many at once. Yields the running continuations every check_every tokens.

    A continuation is done after the token `end`, its last one, or after max_new_tokens; it is yielded once more then.
    engine: one to use again, made for `model`; else one is made for this call, see there.
    """
    if engine is None:
        steps = math.ceil(len(prompts) / MAX_ROWS["cuda"]) * sampling.max_new_tokens
        engine = Engine(model, end, num_tokens, len(prompts), max(map(len, prompts)) + sampling.max_new_tokens,
                        check_every, compiled=steps >= COMPILE_PAYS)
    # on a CPU, rows of one length, which begin together, are faster than rows that are full at all times
    batches = math.ceil(len(prompts) / engine.max_rows)
    at_once = len(prompts) if engine.device.type == "cuda" else math.ceil(len(prompts) / batches)
    for first in range(0, len(prompts), at_once):
        for index in range(first, min(first + at_once, len(prompts))):
            engine.add(Continuation(index, prompts[index], seeds[index], sampling))
        while rows := engine.advance():
            yield rows


def seen_tokens(rows: Sequence[Continuation], end: int, num_tokens: int) -> Tensor:
    """The tokens of each prompt, bool, (rows, num_tokens), for repetition_penalty.

    Without `end`, which begins every prompt: the penalty would keep stories from ending.
    """
    seen = torch.zeros(len(rows), num_tokens, dtype=torch.bool)
    for row, continuation in enumerate(rows):
        seen[row, [token for token in continuation.prompt if token != end]] = True
    return seen


def remove_done_rows(cache: KVCache, rows: Sequence[Continuation], seen: Tensor) -> list[int]:
    """Shrink the cache to the rows that are not done. Returns which row each of the remaining rows was before."""
    kept = sum(not row.done for row in rows)
    last = [row for row in range(kept, len(rows)) if not rows[row].done]
    order = [last.pop() if rows[row].done else row for row in range(kept)]  # rows from the end fill the gaps
    moved = [row for row in range(kept) if order[row] != row]
    copy_rows(cache, moved, cache, [order[row] for row in moved], seen)
    del cache.lengths[kept:]
    return order


def copy_rows(cache: KVCache, rows: Sequence[int], source: KVCache, source_rows: Sequence[int],
              seen: Tensor | None = None) -> None:
    """Copy source_rows of a cache to rows of another cache, or of the same one and of `seen`."""
    if not rows:
        return
    into, of = (send(torch.tensor(numbers), cache.device) for numbers in (rows, source_rows))  # a list would wait
    if seen is not None:
        seen[into] = seen[of]
    for own_layer, source_layer in zip(cache.layers, source.layers, strict=True):
        for own, other in zip(own_layer, source_layer, strict=True):
            own[into, :, :source.length] = other[of, :, :source.length].type_as(own)
    for row, source_row in zip(rows, source_rows, strict=True):
        cache.lengths[row] = source.lengths[source_row]


def prefill(model: Transformer, cache: KVCache, continuations: Sequence[Continuation], rows: Sequence[int]) -> None:
    """Fill these rows of the cache with all tokens of their contexts but the last.

    Equal contexts are computed only once. The others are padded to the longest of their pass; what the padding leaves
    in the cache is hidden, and overwritten by the tokens that follow.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for continuation, row in zip(continuations, rows, strict=True):
        cache.lengths[row] = 0
        rows_of.setdefault(tuple(continuation.context[:-1]), []).append(row)
    contexts = sorted((context for context in rows_of if context), key=len)
    while contexts:
        longest = len(contexts[-1])
        count = max(1, PREFILL_TOKENS // longest)
        of_pass, contexts = contexts[-count:], contexts[:-count]
        filled = KVCache(model.config, len(of_pass), longest, cache.device)
        tokens = torch.tensor([context + (0,) * (longest - len(context)) for context in of_pass])  # (contexts, longest)
        model.hidden_states(send(tokens, cache.device), filled)
        filled.lengths = [len(context) for context in of_pass]
        pairs = [(row, source) for source, context in enumerate(of_pass) for row in rows_of[context]]
        copy_rows(cache, [row for row, _ in pairs], filled, [source for _, source in pairs])
