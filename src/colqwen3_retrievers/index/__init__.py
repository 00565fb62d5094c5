""":class:`PageIndex` and its parts: adding, syncing, searching, copying, page images."""
