"""The top floor: the command line and what runs around training."""
