"""Training: one loop for float models and for quantization-aware fine-tuning, and the float job on top of it."""
