"""The value of a prompt under a frozen policy, V(x): small heads on its hidden states, as A-LoL estimates it."""
