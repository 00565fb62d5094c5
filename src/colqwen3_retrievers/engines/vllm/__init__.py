"""The vLLM engine, its plugin, and the command lines that serve a checkpoint."""
