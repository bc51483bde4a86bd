"""Signals: whatever says how good a response is. One file and one table line each."""
