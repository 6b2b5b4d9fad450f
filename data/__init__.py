"""The data room: where stories come from (stories.py, sample.py) and how they become batches (tokens.py)."""
