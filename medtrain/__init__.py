"""What both tasks share: recipes, cache, sampling, loading, engine, results. Knows no task."""
