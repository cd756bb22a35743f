"""Process layout, DeepSpeed engines and checkpoints."""
