"""The dispatcher: accepts jobs, runs each as a call on a host, stores its records and its end."""
