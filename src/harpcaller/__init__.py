"""The dispatcher: takes jobs, runs each as a call on a host, keeps its records and its end."""
