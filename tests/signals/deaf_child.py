"""Stands for a sandbox's process that never reads what it is told."""

import time

time.sleep(60)
