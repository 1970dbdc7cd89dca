"""The evaluation room: predictions of a model on a test set, scores with intervals, report, card and calibration."""
