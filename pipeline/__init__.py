"""What runs, when and why: the command line, the configuration, keys and staleness, running, reporting."""
