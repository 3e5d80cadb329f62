"""What `lmx plan` is made of: programs compiled for hardware that is not there, a roofline, and a search."""
