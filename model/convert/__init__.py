"""Conversion of trained attention: the heads of one layer, and whole decoders to another mechanism."""
