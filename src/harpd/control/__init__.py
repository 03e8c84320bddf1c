"""harpd's own processes: lifecycle and runtime directory, launcher, supervisor client."""
