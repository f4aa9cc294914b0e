"""Features of scans from a frozen network."""
