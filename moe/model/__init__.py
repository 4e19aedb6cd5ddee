"""The language model: decoder, Mixture-of-Experts layer, experts, and upcycling of dense checkpoints."""
