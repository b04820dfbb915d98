"""Samples on disk: images, labels, bins and the manifest that lists them. Knows no model and no device."""
