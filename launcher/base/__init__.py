"""Utilities for every other package: errors, console output, new folders, verbs. Imports no other room."""
