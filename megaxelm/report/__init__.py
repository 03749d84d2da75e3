"""The report of a run: one self-contained HTML page with an honest comparison, tables and plots."""
