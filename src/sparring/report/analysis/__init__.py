"""Analyse the records of a study: numbers and verdicts."""
