"""The farm's domain: what a job is, what a sample is, what a number means. Knows no queue and no database."""

__version__ = "0.1.0"
