"""Clients of a gateway as processes that cost little themselves: plain sockets, no HTTP library, no event loop."""
