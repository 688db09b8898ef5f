"""Load the base model and the tokenizer, attach adapters, run attention over padding-free batches."""
