"""`kdpipe rows`: the rows of the paper's table, and one of our own, from one configuration and one cache."""
