"""The slot, its stack for groups, and the copies that fill it."""
