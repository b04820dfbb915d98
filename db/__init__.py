"""The truth: tables, transactions and the verbs on them. Knows neither Celery nor devices."""
