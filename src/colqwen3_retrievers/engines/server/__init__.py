"""The engine that uses vLLM servers: requests, checks before first use, and the wire format."""
