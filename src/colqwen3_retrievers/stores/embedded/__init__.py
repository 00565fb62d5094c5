"""The store in a folder: token files, pooled codes and an SQLite catalogue."""
