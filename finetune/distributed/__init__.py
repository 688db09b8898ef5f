"""Processes of a run: process group helpers, consistency between ranks, signals, watchdog."""
