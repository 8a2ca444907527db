"""The way from a layer's call to its launches: what is launched, what it reads and writes, how long the way takes."""
