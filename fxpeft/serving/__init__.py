"""Static slots, prepared once, and the swaps that write them."""
