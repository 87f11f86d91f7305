"""Attack algorithms, one per file, with shared losses and geometry."""
