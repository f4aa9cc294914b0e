"""Pictures and pages: arrays in, PNG and HTML out; knows no case, list or network."""
