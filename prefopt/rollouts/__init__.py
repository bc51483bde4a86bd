"""Rollouts: responses the policy samples while it trains, from prompts to the trainer's windows."""
