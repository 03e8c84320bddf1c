"""harpd's settings: one file becomes one frozen value, checked once; the same check serves --test, start and reload."""
