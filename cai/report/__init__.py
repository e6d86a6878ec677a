"""What people read: one snapshot of a run folder as pages, tables, charts and cards."""
