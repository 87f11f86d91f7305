"""Whether a network keeps a property: questions in the competition's format, and a complete search for their answer."""
