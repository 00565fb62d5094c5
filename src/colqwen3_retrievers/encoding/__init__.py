"""The encoder: its settings, the opened model, and the path of an input to the one thread that owns the engine."""
