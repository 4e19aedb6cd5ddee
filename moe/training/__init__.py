"""Training: set-up, step, optimizer, schedules, validation, and what can go wrong."""
