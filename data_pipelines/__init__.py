"""Pipelines that build preference data: stages over shards with a manifest. `prefopt data` runs them."""
