"""Students: generators with and without input noise."""
