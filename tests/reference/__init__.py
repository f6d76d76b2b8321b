"""The slow, obvious truth: every kernel is tested against the plain code in here."""
