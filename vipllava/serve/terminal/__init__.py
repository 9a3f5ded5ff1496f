"""The chat in a terminal: marks by options and commands, answers as they come."""
