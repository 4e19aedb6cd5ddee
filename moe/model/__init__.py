"""The language model: decoder, Mixture-of-Experts layer, experts, and models made of dense checkpoints."""
