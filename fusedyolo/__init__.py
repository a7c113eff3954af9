"""Training losses of one-stage detectors in one pass over the predictions."""
