"""The training process of one rank: load, loop, step, log, save, validate. Imports board and below."""
