"""Find the fastest micro-batch that fits: from the plan, or by trials in a child process."""
