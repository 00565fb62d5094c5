"""Page embeddings kept by content, in memory and on disk, so that a known page is not encoded again."""
