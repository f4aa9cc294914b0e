"""Lists of many scans: made (index), chosen from (curation), compared (overlap), described (report)."""
