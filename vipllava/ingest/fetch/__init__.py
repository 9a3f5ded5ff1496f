"""The parts of a data set onto this machine: archives, single images, hub files."""
