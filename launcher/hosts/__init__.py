"""Processes on one or many hosts: start, connect, supervise, restart, stop. Imports train and below."""
