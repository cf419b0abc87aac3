"""The engine behind main.py: a YAML file in, a verified checkpoint out. CONTRIBUTING.md is the tour."""
