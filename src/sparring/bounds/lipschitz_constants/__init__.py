"""Local Lipschitz constants: estimates from below, sound bounds from above."""
