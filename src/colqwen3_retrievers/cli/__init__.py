"""The command line ``colqwen3``: one file a command."""
