"""What every example asks of every module."""
