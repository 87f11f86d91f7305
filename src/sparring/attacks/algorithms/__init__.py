"""The attacks themselves, one a file, with the losses and the geometry that they share."""
