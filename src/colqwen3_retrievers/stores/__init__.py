"""Where multi-vectors live: the store protocol, the filter language, and the stores, one folder each."""
