"""Offsite tuning: a model is tuned without being handed over, on data that is not handed over."""
