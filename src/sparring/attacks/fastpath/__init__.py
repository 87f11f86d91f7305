"""Networks whose gradients are written out by hand, where that is faster than autograd."""
