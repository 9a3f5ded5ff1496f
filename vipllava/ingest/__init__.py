"""What makes and checks data sets before training: fetch, build, check, lint."""
