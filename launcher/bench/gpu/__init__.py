"""`headway bench gpu` and its report: limits of a GPU, kernels, mechanisms, steps."""
