"""When to retrieve, what to retrieve, and whose turn it is on the device."""
