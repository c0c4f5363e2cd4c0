"""The demo and the small model that the package ships."""
