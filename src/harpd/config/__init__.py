"""harpd's settings: one file is read into one frozen, validated value, by --test, start and reload alike."""
