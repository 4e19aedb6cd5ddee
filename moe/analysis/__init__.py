"""From the table of runs to tables, statistics, figures and a report: pure functions of columns, no routing metrics."""
