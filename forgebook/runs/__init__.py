"""Where things are stored: the run folder, buckets, downloads, uploads, metrics."""
