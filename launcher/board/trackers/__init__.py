"""Where the records of a run are shown beside its folder: one interface, W&B and MLflow behind it."""
