"""What each step does: one folder a stage, plus what the stages share (`models/`, `miniature/`)."""
