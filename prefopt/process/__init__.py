"""What can happen to a process from outside: signals, the end of another rank, a rank that does not get on."""
