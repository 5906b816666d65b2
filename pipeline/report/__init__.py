"""`kdpipe report`: a run as one HTML page that needs nothing else. What is read, what is drawn, and the page."""
