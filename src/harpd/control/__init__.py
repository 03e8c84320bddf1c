"""harpd's own processes: lifecycle, launcher, supervisor client, runtime directory."""
