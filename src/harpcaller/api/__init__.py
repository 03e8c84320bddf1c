"""The doors of the dispatcher: the client protocol and the control socket."""
