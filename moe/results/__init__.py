"""Run folders in, one table out: runs, conditions, and the tables that a sweep writes."""
