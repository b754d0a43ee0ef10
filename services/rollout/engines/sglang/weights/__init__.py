"""New weights into SGLang servers, whichever way they come. Start at `update`."""
