"""What a router decides, what fits into the capacity, which losses it has, and the sums that remember it."""
