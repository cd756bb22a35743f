"""Data pipeline: corpora, tokenizers, MDS shards, and packed batches in a reproducible, resumable order."""
