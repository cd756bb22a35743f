"""`headway bench peers`: the training step of Headway beside those of other libraries."""
