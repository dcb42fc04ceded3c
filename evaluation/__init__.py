"""Evaluation: features, metrics, reference statistics, the evaluation actor, records, nightly runs and the report page."""
