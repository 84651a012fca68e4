"""What one process is to a segment: its worker row, its kernel locks, its threads."""
