"""Several instances: where requests go, and how they move. Imports no engine code."""
