"""A mixture of two Gaussians in the plane, one of them almost a point."""
