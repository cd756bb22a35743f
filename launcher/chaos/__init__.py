"""`headway chaos`: the same faults against stock DeepSpeed and against Headway, on the user's own machine."""
