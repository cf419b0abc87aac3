"""Better data before training: duplicates, leaks, broken answers and personal data found; a critic; new examples."""
