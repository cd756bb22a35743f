"""`headway bench gpu`: what a GPU can do, and what our kernels and mechanisms make of it, in a given time."""
