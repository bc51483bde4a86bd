"""What `prefopt` commands show and write, beyond training."""
