"""The networks of both stages: drop-in classes with the original's constructors and state dicts."""
