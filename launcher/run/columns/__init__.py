"""Training records as columns of numbers, for runs with a million of them."""
