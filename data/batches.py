"""Batches: which sequences of a token file a step reads, and their inputs and targets.

Sequence i is the seq_len + 1 tokens from i * seq_len on: the first seq_len are the inputs, the last seq_len the
targets. read_batch() is the one place where targets are shifted.
"""

import functools

import numpy as np
import torch

IGNORED = -100  # a target that the loss ignores: the default of torch's cross_entropy


def count_sequences(num_tokens: int, seq_len: int) -> int:
    """How many sequences of seq_len targets num_tokens make, without the incomplete one at the end."""
    return max(0, (num_tokens - 1) // seq_len)


@functools.lru_cache(maxsize=2)
def epoch_order(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of the sequence indices, int64, shape (num_sequences,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def training_sequences(position: int, count: int, num_sequences: int, seed: int) -> np.ndarray:
    """Indices of the sequences at position .. position + count - 1 of all epochs in a row, int64, shape (count,).

    An epoch is each sequence once. A batch may start in one epoch and end in the next, so all batches have one size.
    """
    epochs, offsets = np.divmod(np.arange(position, position + count), num_sequences)
    sequences = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        sequences[here] = epoch_order(num_sequences, seed, int(epoch))[offsets[here]]
    return sequences


def validation_sequences(num_tokens: int, seq_len: int, limit: int = 0) -> np.ndarray:
    """Sequence indices of a full pass, with the incomplete last one, or `limit` of them spread evenly; int64."""
    total = -(-(num_tokens - 1) // seq_len)  # rounded up: every token but the first is predicted once
    if 0 < limit < total:
        return np.linspace(0, total - 1, limit).astype(np.int64)
    return np.arange(total)


def dropout_seed(seed: int, position: int) -> int:
    """The dropout seed of the micro-batch that starts at `position`: the same after a restart, and in any process."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0])


def read_batch(tokens: np.ndarray, sequences: np.ndarray, seq_len: int, device: torch.device,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the given sequences, both int64, (len(sequences), seq_len): targets[t] is inputs[t + 1].

    Past the end of the file, inputs are 0 and targets IGNORED.
    """
    positions = sequences[:, None] * seq_len + np.arange(seq_len + 1)  # (batch, seq_len + 1)
    beyond = positions >= len(tokens)
    block = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int64)  # (batch, seq_len + 1)
    inputs = np.where(beyond, 0, block)[:, :-1]
    targets = np.where(beyond, IGNORED, block)[:, 1:]  # the one shift

    def move(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return move(inputs), move(targets)
