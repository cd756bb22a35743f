"""Solves a free dimension so that variants have equal parameters, FLOPs, KV bytes or time. Imports hosts and below."""
