"""Jobs, lanes and ids. Pure: no clock, no input or output."""
