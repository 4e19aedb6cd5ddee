"""The report: its inputs, its sections, and how it becomes Markdown and HTML."""
