"""Training: set-up, step, optimizer, schedules, validation, and the search for numbers that are not finite."""
