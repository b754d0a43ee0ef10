"""A cluster in which only the controller is real."""
