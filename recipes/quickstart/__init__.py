"""The two-command start: a small policy learns a task, then learns from its own right and wrong answers."""
