"""Research on Mixture-of-Experts routing: change one thing, train small models over a grid, know if it was luck."""
