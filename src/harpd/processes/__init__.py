"""Linux processes: the tree of a call, /proc, cgroups, the environment cookie, prctl, stop reports, orphans."""
