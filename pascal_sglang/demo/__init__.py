"""Models to try things on: a small real one for people, a tiny random one for tests and load."""
