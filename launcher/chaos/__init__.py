"""Faults done to stock DeepSpeed and to Headway, and what became of each run. Imports exchange and below."""
