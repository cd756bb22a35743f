"""Text to tokenizer to MDS shards to packed, resumable, order-stable batches."""
