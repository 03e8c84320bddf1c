"""harpd's own processes: services, launcher, runtime directory, supervisor client."""
