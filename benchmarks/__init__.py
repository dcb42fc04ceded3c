"""Side-by-side measurements; figures are ratios to a baseline of the same run. `make bench` runs those that need no data."""
