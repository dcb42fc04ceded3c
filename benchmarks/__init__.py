"""Side-by-side measurements; every figure is a ratio to a baseline of the same run. `make bench` runs all of them."""
