"""Checkpoints: their families, files, tensors, tokenizers and exact prompts."""
