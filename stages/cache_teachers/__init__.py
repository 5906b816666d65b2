"""Stage one, second half: the response as token ids, and what the teachers know about it, written once."""
