"""What a plan may say, and the tasks that follow from it."""
