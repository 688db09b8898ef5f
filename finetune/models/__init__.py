"""Base model: loading, attention backends, adapters."""
