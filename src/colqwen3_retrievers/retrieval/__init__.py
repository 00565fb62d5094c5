"""What every front end shares: similarity maps, evidence and reranking."""
