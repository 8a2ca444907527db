"""What is measured: the implementations, the shapes, and the suites that put them together."""
