"""Results and data as pages, tables, plots and JSON."""
