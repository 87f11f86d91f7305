"""The stages of a study: train, prune, evaluate, certify, ship."""
