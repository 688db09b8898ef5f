"""Export a result: merge an adapter or a checkpoint into a plain model, write GGUF, the model card, verify."""
