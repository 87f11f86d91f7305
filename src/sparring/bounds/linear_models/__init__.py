"""Linear classifiers: closed forms, and scikit-learn's estimators."""
