"""`headway inspect`: what heads attend to, what experts specialise in, and what each of them is worth.

Imports evaluate and below.
"""
