"""The whole system on real handwritten digits, in minutes on two cores and without a download."""
