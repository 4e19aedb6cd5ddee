"""Models of the transformers library: what a run of this project is in their terms, and its export."""
