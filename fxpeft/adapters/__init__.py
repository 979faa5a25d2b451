"""What a model holds: its adapters, and the verbs that add, load, show, scale, save and take them out."""
