"""Small pure functions, one registry a file: advantages with weights, objectives, aggregations."""
