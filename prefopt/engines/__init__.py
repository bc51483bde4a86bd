"""Engines: whatever turns prompts into sampled responses with a given version of the policy."""
