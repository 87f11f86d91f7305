"""Time a network in every installed engine, and recommend one."""
