"""Build the report: collect its inputs, run its sections, and render it as Markdown and HTML."""
