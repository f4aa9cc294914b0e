"""`dinov2 report`: what a finished or running run's folder tells, on one page that opens offline."""
