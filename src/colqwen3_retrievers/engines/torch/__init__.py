"""The in-process engine: the Qwen3-VL backbone and the projection in PyTorch."""
