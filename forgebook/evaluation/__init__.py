"""Whether a fine-tuned model beats its base, and how certain that is."""
