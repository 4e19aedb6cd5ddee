"""Read run folders into one table, group the runs into conditions, and write the tables of a sweep."""
