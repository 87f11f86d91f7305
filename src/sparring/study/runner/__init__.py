"""Run the tasks of a study, here or on a cluster, and show progress."""
