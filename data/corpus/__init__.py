"""Readers of a corpus: files, containers and rows, as documents, and their division into splits."""
