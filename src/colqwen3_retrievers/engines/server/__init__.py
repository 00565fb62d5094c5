"""The client of a vLLM server: addresses, requests, checks before first use, and the wire format."""
