"""What an adapter would do to a model, before it is done: as data, as a table, as a picture."""
