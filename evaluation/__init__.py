"""Evaluation: the validation pass, likelihood, text metrics, memorization, references, checklist, report."""
