"""The parts of the `miles` command that talk to a gateway, one module a word."""
