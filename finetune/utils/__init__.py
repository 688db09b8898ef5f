"""Errors, console output, atomic file writes."""
