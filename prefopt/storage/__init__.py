"""Files that come into being whole or not at all, and where reusable ones live."""
