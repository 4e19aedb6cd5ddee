"""One run on several processes: ranks, sharded tensors, and experts that are distributed over the ranks."""
