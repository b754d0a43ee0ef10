"""Packages under other names, for functions that were written for another system."""
