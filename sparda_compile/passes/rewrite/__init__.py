"""Write the new program."""
