"""Studies and probe tasks: config files, plans, and execution of the cells. Imports report and below."""
