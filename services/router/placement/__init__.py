"""Which workers there are, what they hold, and who gets the next request."""
