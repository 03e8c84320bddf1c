"""What runs in the zygote and in the process of a call. Lean: every import here costs each fork."""
