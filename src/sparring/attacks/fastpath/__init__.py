"""Networks with hand-written gradients, used where they are faster than autograd."""
