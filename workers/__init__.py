"""What runs on a host with devices. Knows neither Celery nor the database: it is given work and hands back rows."""
