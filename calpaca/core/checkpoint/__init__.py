"""Checkpoints: tensors of a model in files, read and written one at a time, whatever holds them."""
