"""What a method is: pure functions on records, one registry a file. Nothing here knows ranks, devices or engines."""
