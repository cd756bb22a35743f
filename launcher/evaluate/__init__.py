"""Evaluation of models: losses of texts, tasks with choices, the harness, long contexts. Imports exchange and below."""
