"""Reports of studies and probe tasks: text, tables, HTML. Imports compare and below."""
