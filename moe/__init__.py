"""Research on Mixture-of-Experts routing: change one setting, train small models over a grid, test the differences."""
