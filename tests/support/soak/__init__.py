"""A soak: jobs at random on `miles serve` while its processes are killed and frozen. Start reading at `driver`.

`schedule` decides what to do next (pure and seeded), `driver` does it, `invariants` says what must hold meanwhile, and
`figures` records what the processes use. Everything that a run leaves is in one folder, see `records`.
"""
