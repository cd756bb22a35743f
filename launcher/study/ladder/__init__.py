"""Studies of several sizes, and tuning before a study."""
