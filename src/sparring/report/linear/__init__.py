"""The report of a study of linear classifiers."""
