"""From a model's forward to FX graphs."""
