"""Networks, recipes, methods, and the runs that compare them."""
