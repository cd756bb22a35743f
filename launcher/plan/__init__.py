"""`headway plan`: memory, traffic and speed of a spec without training. Imports match and below."""
