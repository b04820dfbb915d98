"""Numbers from rows and scores. Knows neither devices nor databases."""
