"""From a config to the sites it takes: names, patterns, roles, an architecture's defaults."""
