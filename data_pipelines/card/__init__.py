"""The card of a pair set: what is in it, and what is wrong with it. `prefopt data card` writes it."""
