"""Run an attack, recount its successes, and flag unreliable results."""
