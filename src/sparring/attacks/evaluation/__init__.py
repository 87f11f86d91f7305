"""Run an attack, count its successes afresh, and flag what makes the result doubtful."""
