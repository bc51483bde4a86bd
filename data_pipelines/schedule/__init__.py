"""Schedules: named steps, each a command in a process of its own, in order and in loops."""
