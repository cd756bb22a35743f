"""Studies and probe tasks: what a file says, its cells, running them. Imports report and below."""
