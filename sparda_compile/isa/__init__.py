"""The instruction set: what every op is, and the streams it runs on."""
