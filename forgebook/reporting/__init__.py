"""What people read and look at: console, plots, run texts, trackers."""
