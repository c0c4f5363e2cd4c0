"""The Forecast: its projection, its weights and where it starts."""
