"""Stores of multi-vectors: protocol, filter language, and a folder for each."""
