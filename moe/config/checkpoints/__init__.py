"""What checkpoints to start from say about the model: dense ones, Mixtures of Experts, and saved models of ours."""
