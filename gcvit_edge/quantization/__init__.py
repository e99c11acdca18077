"""Quantization of the deploy form in PyTorch, so that one set of weights and ranges feeds every backend.

ranges.py observes activations; scheme.py says what a recipe and a runtime's arithmetic mean for each layer; layers.py has the
layers that compute so; integers.py the numbers themselves; learned.py the same layers, to be trained.
"""
