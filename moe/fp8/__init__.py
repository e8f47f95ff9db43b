"""Matrix products in FP8, emulated: what is rounded, how it is added up, and what it is like on the wire."""
