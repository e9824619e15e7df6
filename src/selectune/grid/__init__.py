"""Many runs at once: methods x tasks x seeds, their forecast, their table and their page."""
