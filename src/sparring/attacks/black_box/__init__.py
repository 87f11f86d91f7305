"""Attacks that see no gradient, only logits or the predicted class."""
