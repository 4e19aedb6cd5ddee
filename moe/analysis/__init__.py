"""Makes statistics, verdicts, figures and a report from the table of runs. It never computes a routing metric."""
