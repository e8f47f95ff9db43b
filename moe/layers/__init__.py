"""The layers of the transformer: one idea a file."""
