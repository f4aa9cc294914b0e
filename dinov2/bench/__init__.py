"""`dinov2 bench`: what a run is held up by on this machine, and what it will take, before it is started."""
