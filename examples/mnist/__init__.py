"""MNIST: one "9" repeated against all "3"."""
