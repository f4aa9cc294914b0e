"""What results are scored by."""
