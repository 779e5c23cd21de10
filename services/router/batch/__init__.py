"""Files of requests, run when there is room."""
