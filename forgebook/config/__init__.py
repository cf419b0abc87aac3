"""What a config file may say: keys, blocks, what goes together, and how files are read."""
