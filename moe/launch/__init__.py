"""Read a command line, carry out the cells of a sweep, and train each cell."""
