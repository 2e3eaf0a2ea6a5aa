"""One check of everything that a GPU changes; see `check.sh`."""
