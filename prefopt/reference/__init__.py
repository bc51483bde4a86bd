"""The frozen policy that log-ratios are taken against: stored, live or moving."""
