"""Compare a result with its base: on held-out conversations, on benchmarks, and on what the base could do."""
