"""The scheduling policy: pure and deterministic. Imports the standard library only."""
