"""Results side by side.

`outputs` reads them, `comparability` says which may be compared, `compare` pairs their examples, with the
statistics of `paired` and the `frontier`. `tree` is what comes out. `wording` puts it into words for `table` and
`page`.
"""
