"""Load a YAML file into a validated spec: reading, merging, validation, advice, legal layouts. Imports base."""
