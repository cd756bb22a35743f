"""`headway bench gpu` and its report: measure the limits of a GPU, kernels, mechanisms and steps."""
