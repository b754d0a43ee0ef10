"""What must hold of a soak, one idea a file: functions and small trackers that return faults."""
