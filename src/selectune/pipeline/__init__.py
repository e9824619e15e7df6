"""One run, step by step: what its steps share, do, cost, put on record and tell."""
