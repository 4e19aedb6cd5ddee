"""Make statistics, verdicts, figures and a report from the table of runs. No routing metric is computed here."""
