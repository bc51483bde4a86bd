"""Attention over groups laid out as prompt and branches; one implementation a module."""
