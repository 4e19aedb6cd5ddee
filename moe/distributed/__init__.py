"""One run on several processes: who they are, and tensors that are spread over them."""
