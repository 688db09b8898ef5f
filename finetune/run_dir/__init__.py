"""Contents of an `output_dir`: run.json, the lock, stored evaluation results."""
