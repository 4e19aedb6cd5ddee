"""Adapters: few new parameters that learn while the weights of a model are frozen. One file for each kind."""
