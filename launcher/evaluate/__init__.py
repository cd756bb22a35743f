"""Evaluation of trained models: losses of texts, tasks with choices, the harness of EleutherAI, long contexts."""
