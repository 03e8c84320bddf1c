"""The APIs of the dispatcher: the client API and the control API."""
