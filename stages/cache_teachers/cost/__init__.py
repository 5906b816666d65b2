"""What caching the teachers will cost, in bytes and seconds, found before any model is loaded."""
