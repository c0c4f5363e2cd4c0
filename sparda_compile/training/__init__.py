"""Training Forecasts: the loss, the model's forward with taps, the loop, the data."""
