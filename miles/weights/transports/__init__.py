"""One module per weight transport."""
