"""Which nodes are targets: kinds, patterns, names and roles."""
