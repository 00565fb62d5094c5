"""The store in a Qdrant collection."""
