"""How the last line of a run's log begins, for the loop that writes it and for `dinov2 watch`, which reads it."""

ENDING_DONE = "done:"
ENDING_STOPPED = "stopped after iteration"
ENDING_COLLAPSED = "collapsed by iteration"
