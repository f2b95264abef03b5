"""Scoring and using a trained model."""
