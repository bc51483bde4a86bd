"""Results side by side: pairing, statistics, the table and the page."""
