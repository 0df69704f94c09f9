"""Forecasts of answer lengths, and what can be decided with them."""
