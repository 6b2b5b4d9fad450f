"""Inference: the engine that continues many prompts, sampling, packed weights."""
