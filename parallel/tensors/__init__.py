"""The tensors of a checkpoint: what each rank holds of them, their files, and reading them in any layout."""
