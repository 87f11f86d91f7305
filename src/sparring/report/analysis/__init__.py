"""What the records of a study show, as numbers and verdicts."""
