"""The glue: Celery tasks that hand work from the database to devices, and the coordinator that keeps it flowing."""
