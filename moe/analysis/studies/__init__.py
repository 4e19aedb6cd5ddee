"""What only one source study needs. `registered` lists the studies that add something to the report."""
