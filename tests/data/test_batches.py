"""Batches have the next tokens as targets, and an epoch has every sequence once."""

import numpy as np
import pytest
import torch

from data.batches import IGNORED, count_sequences, read_batch, training_sequences, validation_sequences

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tokens", "seq_len", "sequences"), [(1, 4, 0), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2)])
def test_a_sequence_needs_one_token_more_than_its_length(tokens, seq_len, sequences):
    assert count_sequences(tokens, seq_len) == sequences


def test_targets_are_the_next_tokens():
    tokens = np.arange(100, 121, dtype=np.uint16)
    inputs, targets = read_batch(tokens, np.array([1, 0, 4]), 4, CPU)
    assert inputs.tolist() == [[104, 105, 106, 107], [100, 101, 102, 103], [116, 117, 118, 119]]
    assert targets.tolist() == [[105, 106, 107, 108], [101, 102, 103, 104], [117, 118, 119, 120]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_an_epoch_is_every_sequence_once_in_an_order_of_seed_and_epoch_alone():
    first, second = training_sequences(0, 50, 50, seed=1), training_sequences(50, 50, 50, seed=1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist() != list(range(50))
    assert training_sequences(0, 50, 50, seed=2).tolist() != first.tolist()
    pieces = [training_sequences(p, 7, 50, seed=1) for p in range(0, 105, 7)]  # batches that cross the epochs' ends
    assert np.concatenate(pieces)[:100].tolist() == [*first, *second]


def test_the_order_is_the_documented_one():
    assert training_sequences(3, 2, 10, seed=5).tolist() == np.random.default_rng([5, 0]).permutation(10)[3:5].tolist()


def test_validation_predicts_every_token_but_the_first_once():
    tokens = np.arange(100, 123, dtype=np.uint16)  # 23 tokens: 5 sequences of 4 and one of 2
    sequences = validation_sequences(len(tokens), 4)
    together = read_batch(tokens, sequences, 4, CPU)
    one_by_one = [read_batch(tokens, sequences[i:i + 1], 4, CPU) for i in range(6)]
    for one, many in zip(zip(*one_by_one, strict=True), together, strict=True):
        assert torch.equal(torch.cat(one), many)
    inputs, targets = together
    assert targets[targets != IGNORED].tolist() == list(range(101, 123))
    assert inputs.shape == targets.shape == (6, 4)
    assert inputs[-1].tolist() == [120, 121, 122, 0]
    assert (targets - inputs)[targets != IGNORED].eq(1).all()


def test_a_limited_validation_is_spread_evenly_and_fixed():
    assert validation_sequences(1001, 10, limit=5).tolist() == [0, 24, 49, 74, 99]
    assert validation_sequences(1001, 10, limit=500).tolist() == list(range(100))
