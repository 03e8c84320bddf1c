"""The zygote and the workers that it forks. Lean: every import here costs each fork."""
