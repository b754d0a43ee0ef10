"""SGLang's own flags, which settings `sglang_…` pass to its servers: checked against SGLang's list before any starts.

`flags.tsv` is that list, written by tools/sglang_flags.py; `server_flags` reads it, `values` checks a value, `tables`
says which flags are settings of ours, refused or renamed, and `taking` applies all of it to a configuration.
"""
