"""Finds the fastest micro-batch that fits: by the plan, or by trials in a child process."""
