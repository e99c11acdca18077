"""Targets: where artifacts are run and timed; one module each, the file name is the registry."""
