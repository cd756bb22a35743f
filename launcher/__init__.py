"""The front door: command line, specs, process launch, training loop, tracking, studies, reports."""
