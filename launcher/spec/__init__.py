"""From a YAML file to a validated spec: reading, merging, checking, advice, legal layouts. Imports base."""
