"""Loading of functions by their dotted paths."""

from miles.extensions.loading import load_function as load_function
