"""The subcommands of `miles` that talk to a gateway, one module each. Start at `common`."""
