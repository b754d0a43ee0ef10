"""Gateway clients as processes with little overhead: plain sockets, no HTTP library, no event loop."""
