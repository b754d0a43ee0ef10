"""Loading of functions."""

from miles.utils.misc import load_function as load_function
