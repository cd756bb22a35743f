"""Inject faults into stock DeepSpeed and Headway, and judge each run. Imports evaluate and below."""
